"""The base of every typed option group: unknown keys are errors, values are frozen, docstrings are the reference."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """One section of the configuration tree.

    A field's docstring (the string literal under it) states its unit and its reason; `docs/configuration.md` is
    made from these docstrings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
