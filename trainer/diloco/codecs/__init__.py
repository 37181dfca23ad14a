"""Codecs: how a pseudo-gradient is encoded on the wire. One file per family; each states its error bound.

A codec is a `Codec` class in a module of this package. Its literal `name` is a choice of `codec` in the configuration.
"""

from trainer.diloco.codecs.codec import Codec
from trainer.diloco.codecs.dct import Dct
from trainer.diloco.codecs.dense import Bf16, Bins, Fp32, Int2, Int3, Int4, Int8, Integer, Sign, Ternary
from trainer.diloco.codecs.sparse import TopK
from trainer.plugins import named_classes

__all__ = [
    "Bf16",
    "Bins",
    "Codec",
    "Dct",
    "Fp32",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Integer",
    "Sign",
    "Ternary",
    "TopK",
    "make",
]


def make(name: str, *, feedback: float = 0.0, topk: int = 0, values: str = "fp32") -> Codec:
    """The codec for a name in the configuration.

    Args:
        name: A choice of `codec`, or "demo".
        feedback: Error-feedback decay.
        topk: For "sparse", the number of values sent for each block of 4096 (0: depends on the number of members); for
            "demo", the number of coefficients sent for each 64 x 64 tile.
        values: For "demo": the codec of the coefficients.
    """
    if name == "demo":
        return Dct(TopK(topk, values=named_classes(__name__)[values](block=topk)), feedback=feedback)
    codec: Codec = named_classes(__name__)[name].configured(feedback, topk)
    return codec
