"""What all groups of parameters are made of."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Nodes = Annotated[int, Field(gt=0, le=64)]  # one that sums for all others would be the bottleneck of more
Tag = Annotated[str, Field(min_length=1, max_length=64)]  # Weights & Biases takes no other

RUN_ID = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$"  # it names directories, keys and Weights & Biases runs
WANDB_PROJECT = r"^[^/\\#?%:]{0,128}$"
WANDB_RUN_ID = r"^[^\s:;,#?/']{0,120}$"
PORT_RANGE = r"^([0-9]{1,5}-[0-9]{1,5})?$"
DEVICE = r"^(cpu|cuda(:\d+)?)$"
LABEL = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"  # DNS-1035
NAMESPACE = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"  # DNS-1123
IN_WORDS = {
    RUN_ID: "must be at most 63 letters, digits and . _ -, the first of them a letter or a digit",
    WANDB_PROJECT: "must be at most 128 characters, none of them / \\ # ? % :",
    WANDB_RUN_ID: "must be at most 120 characters, none of them a space or : ; , # ? / '",
    PORT_RANGE: "must be low-high, for example 7000-7099",
    DEVICE: "must be cpu, cuda or cuda:<index>",
    LABEL: "must be lower-case letters, digits and -, begin with a letter and not end with -",
    NAMESPACE: "must be lower-case letters, digits and -, and neither begin nor end with -",
}


@dataclass(frozen=True)
class Later:
    """Marks a parameter whose behaviour is still to come: any value but its default is refused."""

    what: str


class Group(BaseModel):
    """A group of parameters: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)
