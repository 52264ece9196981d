"""Packed sequences in models of `transformers`, which looks for them in the values of the tokens' positions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def taken_for_unpacked() -> Iterator[None]:
    """While entered, `transformers` finds every row of a batch to be one sequence.

    Fake tensors have no values to find that in, so it would build a mask of batch x length x length for sequences that
    may be packed, which a real step on unpacked ones does without. Nothing happens where it is not imported.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return

    def none_found(position_ids: Any) -> None:
        find(position_ids)  # for what it allocates

    with patch.object(masks, "find_packed_sequence_indices", none_found):
        yield
