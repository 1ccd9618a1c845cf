"""Hugging Face configurations."""
from typing import Any
def from_config(config: Any) -> Any:
    """TODO."""
