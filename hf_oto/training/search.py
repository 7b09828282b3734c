"""A search over settings of the training and of the compression at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import OTOConfig
from ..renamed import OLD_SETTINGS, refuse_old_names


def split_space(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a trial that are fields of [`OTOConfig`], and the others. A name that both have is its."""
    refuse_old_names("The search space", values, OLD_SETTINGS)
    names = {field.name for field in dataclasses.fields(OTOConfig)}
    found = {name: value for name, value in values.items() if name in names}
    return found, {name: value for name, value in values.items() if name not in names}
