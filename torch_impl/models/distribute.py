"""The entry: a model of any kind that can be spread."""

from torch import nn

from lvxattn.torch_impl.group import AnyGroup, Group
from lvxattn.torch_impl.models.encoder_decoder import EncoderDecoder
from lvxattn.torch_impl.models.idefics import Idefics
from lvxattn.torch_impl.models.mllama import Mllama
from lvxattn.torch_impl.models.openflamingo import OpenFlamingo
from lvxattn.torch_impl.models.owl3_adapter import SpreadOwl3
from lvxattn.torch_impl.models.spread import Spread

KINDS = Mllama, Idefics, OpenFlamingo, SpreadOwl3, EncoderDecoder


def distribute(
    model: nn.Module,
    group: AnyGroup = None,
    *,
    text: str = "replicated",
    schedule: str = "lv-xattn",
    recompute_kv: bool = True,
) -> Spread:
    """Shard the visual input of a multimodal model over ranks.  Changes the model in place.

    Every rank has the whole model and the same weights, encodes its own images, and keeps their
    keys and values; cross-attention is over all ranks' keys.  Not collective.

    Parameters
    ----------
    model : Module
        Of transformers: Mllama (Llama 3.2 Vision), Idefics, Whisper, or another encoder and decoder
        whose cross-attention calls the model's attention function; or OpenFlamingo's ``Flamingo``,
        or `owl3.Owl3`.
    group : ProcessGroup or one-dimensional DeviceMesh, optional
        The ranks; default: the world.
    text : str
        ``"replicated"``: every rank has the whole text.  ``"sharded"``: every rank has some of its
        rows, and self-attention is over all ranks' rows; for training only, and not for
        encoder-decoders.
    schedule : str
        As in `cross_attention`; with replicated text there is nothing to choose.
    recompute_kv : bool
        Whether a backward makes keys and values again instead of keeping them.

    Returns
    -------
    Spread

    Raises
    ------
    ValueError
        A model without cross-attention that can be spread, or that was distributed before, or
        another `text`.

    Examples
    --------
    On every rank, for a model and a batch of transformers:

    >>> spread = distribute(model, group)  # doctest: +SKIP
    >>> model(**spread.inputs(**batch)).loss.backward()  # doctest: +SKIP
    >>> spread.average_gradients()  # doctest: +SKIP
    """
    comm = Group.of(group)
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    if any(isinstance(getattr(hook, "__self__", None), Spread) for hook in hooks):
        raise ValueError(f"model: expected one that is not distributed yet (on {comm.name})")
    for kind in KINDS:
        # A wrapper, such as of peft, has the model inside.
        inner = next(filter(kind.fits, model.modules()), None)
        if inner is None:
            continue
        if text not in kind.texts:
            raise ValueError(
                f"text: expected {' or '.join(map(repr, kind.texts))} for {type(inner).__name__}, "
                f"got {text!r} (on {comm.name})"
            )
        spread = Spread(model, comm, text=text, schedule=schedule, recompute_kv=recompute_kv)
        spread.adapter = kind(inner, spread)
        inner.register_forward_pre_hook(spread.before_forward, with_kwargs=True)
        return spread
    raise ValueError(
        "model: expected Mllama, Idefics, Whisper, OpenFlamingo, Owl3, or an encoder and decoder "
        f"of transformers, got {type(model).__name__} (on {comm.name})"
    )
