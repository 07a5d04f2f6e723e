"""What a self-test found, and the matrix of wrong kernels by cases in which it is shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import ascii_letters
from textwrap import wrap

from lvxattn.check.cases import CASES, suite_of

_SHORT = {"float64": "64", "float32": "32", "float16": "16", "bfloat16": "b16"}
_USUAL = {"NumPy": ("float64", "float32"), "PyTorch": ("float32", "bfloat16")}
_WIDTH = 110
_SHOWN = 4


@dataclass(frozen=True)
class SelfTest:
    """What came out.

    Attributes
    ----------
    caught : dict
        By wrong kernel, by case that catches it, the dtypes in which it does.
    ratios : dict
        By right kernel, by dtype, the largest error over its limit.
    alarms : tuple of str
        Where right kernels were called wrong.
    seeds : int
        How many problems of each case the right kernels got.
    """

    caught: dict[str, dict[str, list[str]]]
    ratios: dict[str, dict[str, float]]
    alarms: tuple[str, ...]
    seeds: int

    @property
    def passed(self) -> bool:
        """Whether nothing is missing."""
        return not (self.missed() or self.idle() or self.alarms)

    def missed(self, dtypes: Sequence[str] | None = None) -> list[str]:
        """Return the wrong kernels that no case catches.

        Parameters
        ----------
        dtypes : sequence of str, optional
            Count the quick suite in these dtypes alone.
        """
        if dtypes is None:
            return [name for name, cases in self.caught.items() if not cases]
        quick = [case.name for case in suite_of("quick")]
        return [
            name
            for name, cases in self.caught.items()
            if not any(set(cases.get(case, [])) & set(dtypes) for case in quick)
        ]

    def alone(self) -> dict[str, list[str]]:
        """Return, by case, the wrong kernels that no other case of its group catches."""
        return {
            case.name: [
                name
                for name, cases in self.caught.items()
                if [c.name for c in CASES if c.group == case.group and c.name in cases]
                == [case.name]
            ]
            for case in CASES
        }

    def idle(self) -> list[str]:
        """Return the cases that are never alone in their group."""
        return [case for case, names in self.alone().items() if not names]

    def __str__(self) -> str:
        """Return everything as text."""
        parts = (_table, _legend, _missed, _right, _verdict)
        return "\n\n".join("\n".join(part(self)) for part in parts)


def _table(found: SelfTest) -> Iterator[str]:
    """Yield a line for each wrong kernel, with a column for each case."""
    alone, letters, groups = found.alone(), _letters(), _groups()
    width = max(map(len, found.caught))
    yield "Wrong kernels, and the cases that catch them: # alone in its group, + with others of it."
    yield "At the end the dtypes in which they are caught: fp64, fp32, fp16, bf16."
    yield ""
    yield " " * width + "".join("  " + "".join(letters[case] for case in g) for g in groups)
    for name, cases in found.caught.items():
        marks = [
            "".join("." if c not in cases else "#" if name in alone[c] else "+" for c in group)
            for group in groups
        ]
        dtypes = [short for x, short in _SHORT.items() if any(x in d for d in cases.values())]
        yield f"{name:{width}}  {'  '.join(marks)}  {' '.join(dtypes)}"


def _legend(found: SelfTest) -> Iterator[str]:
    """Yield the cases by group, and what each is alone to catch: what fewest catch comes first."""
    alone, letters = found.alone(), _letters()
    width = max(map(len, alone))
    yield "Cases, and what they are alone in their group to catch:"
    for group in _groups():
        yield ""
        for name in group:
            head = f"  {letters[name]}  {name:{width}}  "
            names = sorted(alone[name], key=lambda wrong: len(found.caught[wrong]))
            more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
            text = ", ".join([*names[:_SHOWN], *more]) or "nothing"
            lines = wrap(text, _WIDTH - len(head))
            yield f"\n{' ' * len(head)}".join([head + lines[0], *lines[1:]])


def _missed(found: SelfTest) -> Iterator[str]:
    """Yield what the quick suite does not catch."""
    yield "The quick suite misses in its usual dtypes:"
    for name, dtypes in _USUAL.items():
        head = f"  {name} ({', '.join(dtypes)}): "
        yield from wrap(
            head + (", ".join(found.missed(dtypes)) or "none"), _WIDTH, subsequent_indent=" " * 4
        )


def _right(found: SelfTest) -> Iterator[str]:
    """Yield the largest errors of right kernels."""
    width = max(map(len, found.ratios))
    dtypes = list(next(iter(found.ratios.values())))
    seeds = f"{found.seeds} seeds" if found.seeds > 1 else "1 seed"
    yield f"Right kernels on the quick suite with {seeds}, and on long keys: largest error / limit"
    yield ""
    yield " " * width + "".join(f"{dtype:>10}" for dtype in dtypes)
    for name, ratios in found.ratios.items():
        yield f"{name:{width}}" + "".join(f"{ratios[dtype]:10.2f}" for dtype in dtypes)


def _verdict(found: SelfTest) -> Iterator[str]:
    """Yield what is missing, and whether that is nothing."""
    missed, idle = found.missed(), found.idle()
    yield f"{len(found.caught) - len(missed)} of {len(found.caught)} wrong kernels are caught"
    yield from (f"  not caught: {name}" for name in missed)
    yield f"{len(CASES) - len(idle)} of {len(CASES)} cases are alone in their group to catch one"
    yield from (f"  never alone: {name}" for name in idle)
    yield f"{len(found.alarms)} false alarms"
    yield from (f"  {alarm}" for alarm in found.alarms)
    yield "passed" if found.passed else "FAILED"


def _letters() -> dict[str, str]:
    return dict(zip((case.name for case in CASES), ascii_letters, strict=False))


def _groups() -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for case in CASES:
        groups.setdefault(case.group, []).append(case.name)
    return list(groups.values())
