"""Conversations: only what is new of one is read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from supra_jax.inference.state import State

_SNAPSHOTS = 8  # states that a conversation may go on from
_LARGE_BYTES = 2**28  # a key/value cache of a long conversation


class Memory:
  """The states of a conversation: what was read is not read again."""

  def __init__(self) -> None:
    """Begins with nothing read."""
    self._states: list[State] = []

  def longest(self, ids: Sequence[int]) -> State | None:
    """Returns the state that has read the longest beginning of these tokens, if any has read one; warns if it is not
    the newest one."""
    fits = [state for state in self._states if list(ids[: state.tokens[0].size]) == state.tokens[0].tolist()]
    found = max(fits, key=lambda state: state.tokens[0].size, default=None)
    left = len(ids) - (0 if found is None else found.tokens[0].size)
    if self._states and found is not self._states[-1] and left:
      warnings.warn(
        f"These messages do not go on from the last reply: {left} of their {len(ids)} tokens are read.", stacklevel=4
      )
    return found

  def keep(self, state: State) -> None:
    """Remembers a state, the newest; forgets the oldest, of those that take much memory all but two."""
    kept = [held for held in self._states if held is not state]
    most = 2 if state.size_bytes > _LARGE_BYTES else _SNAPSHOTS
    self._states = [*kept, state][-most:]
