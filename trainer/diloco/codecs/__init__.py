"""Codecs: how a pseudo-gradient is put on the wire. One file a family; each says what error it allows."""

from collections.abc import Callable

from trainer.diloco.codecs.codec import Codec
from trainer.diloco.codecs.dct import Dct
from trainer.diloco.codecs.dense import Bf16, Fp32, Int4, Int8, Integer, Sign, Ternary
from trainer.diloco.codecs.sparse import TopK

__all__ = ["Bf16", "Codec", "Dct", "Fp32", "Int4", "Int8", "Integer", "Sign", "Ternary", "TopK", "make"]

_DENSE: dict[str, Callable[..., Codec]] = {codec.name: codec for codec in (Fp32, Bf16, Int8, Int4, Ternary, Sign)}


def make(name: str, *, feedback: float = 0.0, topk: int = 512, values: str = "fp32") -> Codec:
    """A codec by its name in the configuration.

    Args:
        name: One of `codec`'s, or "demo".
        feedback: Decay of the residual that is kept.
        topk: Of "sparse": how many numbers of each 4096 are sent; of "demo": how many coefficients of each 64 x 64.
        values: Of "demo": the codec of the coefficients.
    """
    if name == "demo":
        return Dct(TopK(topk, values=_DENSE[values](block=topk)), feedback=feedback)
    if name == "sparse":
        return TopK(topk, feedback=feedback)
    if name == "ternary":
        return Ternary(feedback=feedback, mean=Integer(2, Ternary().block))
    return Fp32() if name == "fp32" else _DENSE[name](feedback=feedback)
