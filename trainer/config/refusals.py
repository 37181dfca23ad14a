"""How a bad configuration is refused: the field, the value, and what is allowed."""

import difflib
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from trainer.config.fields import IN_WORDS, UNSET
from trainer.config.parameters import Parameter
from trainer.errors import ConfigError


def first_error(error: ValidationError, parameters: list[Parameter]) -> ConfigError:
    """The first of pydantic's errors, in our words."""
    known = {".".join(parameter.path): parameter for parameter in parameters}
    details = error.errors()[0]
    if isinstance(cause := details.get("ctx", {}).get("error"), ConfigError):
        return cause
    # The location of a list's element, or of one branch of a union, is longer than the field's path.
    location = ".".join(str(part) for part in details["loc"])
    field = next((name for name in known if location == name or location.startswith(name + ".")), location)
    if field == "sites":  # its elements have fields of their own
        field = location
    parameter = known.get(field)
    if details["type"] == "extra_forbidden":
        return ConfigError(location, "…" if is_secret(location) else details["input"], unknown(location, known))
    if parameter and parameter.choices:
        return ConfigError(field, details["input"], f"must be one of {', '.join(parameter.choices)}")
    if words := IN_WORDS.get(details.get("ctx", {}).get("pattern", "")):
        return ConfigError(field, details["input"], words)
    message = details["msg"].replace("Input should be", "must be").replace("String should", "must")
    unset = f", or {UNSET}" if parameter and parameter.may_be_unset else ""
    return ConfigError(field, details["input"], message[0].lower() + message[1:] + unset)


def unknown(name: str, known: Mapping[str, object], shown: Callable[[str], str] = str) -> str:
    """The refusal of a name that no parameter has.

    Args:
        name: The name, as given.
        known: The parameters, by the kind of name that was given.
        shown: How a suggested name is written.
    """
    if is_secret(name):
        return "is a secret, not a parameter: set WANDB_API_KEY, HF_TOKEN or ETCD_PASSWORD in the environment"
    near = difflib.get_close_matches(name, known, n=1)
    return "no such parameter" + (f"; did you mean {shown(near[0])}?" if near else "")


def is_secret(name: str) -> bool:
    """Whether an unknown name asks for a secret, whose value must not be shown."""
    return any(word in name.lower().replace("_", "") for word in ("key", "token", "password", "secret"))
