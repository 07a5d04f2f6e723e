"""Make slides from the notebooks: 20 of their pictures, with a sentence each, as one PDF.

    python tutorials/slides.py [FILE]

The pictures are those stored in the notebooks, so that slides show what readers see.
"""

import base64
import sys
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import matplotlib.pyplot as plt
import nbformat
from matplotlib.backends.backend_pdf import PdfPages
from PIL import Image

from lvxattn.draw.rotation import INK

HERE = Path(__file__).parent
SIZE = 13.33, 7.5  # inches


class Slide(NamedTuple):
    """A picture of a notebook: of the last cell with this text that has one."""

    notebook: str
    cell: str
    title: str
    sentence: str


SLIDES = [
    Slide("00", "two_rings(", "Who should travel?",
          "A rank holds a part of the video and a part of the text. Areas are bytes: either keys "
          "and values go round, or the few queries and their results."),
    Slide("01", "window_of_scores(", "Softmax needs its largest score",
          "Subtract each row's own largest score: out does not change, and no exponential is "
          "infinite."),
    Slide("01", "weight_of_a_part(", "Two parts merge by their lse",
          "The log of each part's denominator determines its weight in the whole. Nothing else of "
          "the part's keys is needed."),
    Slide("01", "dead_rows(", "Rows that see nothing",
          "A part without visible keys has lse = -inf and weight 0. Written literally, the formula "
          "gives NaN."),
    Slide("02", "byte_bars(", "What one rank sends in a layer",
          "On long videos the schedules that move queries send 1/24 to 1/619 of the bytes of Ring "
          "Attention, depending on tokens a frame and on shared heads."),
    Slide("02", "bytes_over_frames(", "Queries do not grow with the video",
          "The bytes of LV-XAttn depend on the text alone; those of Ring Attention on the video."),
    Slide("02", "computed_and_measured(", "Computed, and measured",
          "On links of 50 Mbit/s the bytes are as planned, and the time is that of the longer of "
          "wire and arithmetic."),
    Slide("02", "winners(", "Which schedule wins, and where",
          "Short texts about long videos: gather or LV-XAttn. Long texts about short videos: "
          "Ulysses or Ring Attention. The planner finds out."),
    Slide("03", "film_strip(logs", "The ring, hop by hop",
          "Boxes are keys and values, discs queries. On the left the discs travel, with their "
          "results one hop behind; on the right the boxes do."),
    Slide("03", "two_passes(", "Send first, then compute",
          "A block that is sent on before the work on it begins travels during the work. This "
          "hides the shorter of the two."),
    Slide("04", "waiting_in_a_circle(", "If all send first, all wait",
          "Every rank waits until its neighbour receives: a deadlock, unless MPI happens to buffer "
          "the message."),
    Slide("04", "on_one_axis(", "Three programs on one time axis",
          "Measured on one machine: LV-XAttn, Ring Attention, and a program that waits at every "
          "hop."),
    Slide("05", "weights_by_rank(", "Backward: one lse for all",
          "With the lse over all keys a rank computes the weights of its own keys alone, and "
          "gradients of parts are plain sums."),
    Slide("05", "journey_of_dq(", "dq travels, dk and dv stay",
          "A query's gradient visits every rank and comes home; gradients of keys and values never "
          "leave."),
    Slide("06", "recomputation.stored(", "Forget keys and values",
          "Every layer's keys and values follow from the same visual features by one matrix "
          "product: do not store them."),
    Slide("06", "frames_that_fit(", "Longer videos fit",
          "Recomputing keys and values leaves room for about three times as many frames on "
          "the same GPUs."),
    Slide("07", "training.lengths(", "Train short clips first",
          "At first, long clips alone teach nothing: the loss stays at that of guessing."),
    Slide("08", "beside_the_plan(", "The plan, and your machine",
          "Every schedule at three sizes: measured, beside what the planner predicts from this "
          "machine's own figures."),
    Slide("09", "bytes_by_layer(", "A real model, layer by layer",
          "Llama 3-V on two ranks: a layer of cross-attention sends as much as one of "
          "self-attention, for a video of any length."),
    Slide("09", "from_layer_to_model(", "A layer's gain and a model's",
          "What does not wait for messages bounds the gain of the whole: Amdahl's law."),
]  # fmt: skip


def main() -> None:
    """Write the slides."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "slides.pdf")
    with PdfPages(path, metadata={"Title": "LV-XAttn", "CreationDate": None}) as pages:
        for number, slide in enumerate(SLIDES, 1):
            figure = drawn(slide, number)
            pages.savefig(figure)
            plt.close(figure)
    print(f"{len(SLIDES)} slides in {path}")


def drawn(slide: Slide, number: int) -> plt.Figure:
    """Return a slide as a figure."""
    figure = plt.figure(figsize=SIZE)
    figure.text(0.05, 0.9, slide.title, size=30, color=INK, weight="bold")
    figure.text(0.05, 0.045, fill(slide.sentence, 92), size=17, color=INK, linespacing=1.4)
    figure.text(
        0.95, 0.95, f"notebook {slide.notebook}    {number}", size=10, color="0.5", ha="right"
    )
    axes = figure.add_axes((0.05, 0.17, 0.9, 0.68))
    axes.imshow(picture(slide), interpolation="antialiased")
    axes.axis("off")
    return figure


def picture(slide: Slide) -> Image.Image:
    """Return a slide's picture.

    Raises
    ------
    LookupError
        The notebook has no such cell with a picture.
    """
    (path,) = HERE.glob(f"{slide.notebook}_*.ipynb")
    for cell in reversed(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code" and slide.cell in cell.source:
            for out in cell.outputs:
                if "image/png" in out.get("data", {}):
                    return Image.open(BytesIO(base64.b64decode(out.data["image/png"])))
    raise LookupError(f"{path.name} has no picture of a cell with {slide.cell!r}")


if __name__ == "__main__":
    main()
