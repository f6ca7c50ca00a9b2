"""Decides how many tokens the next step may have.

Decodes wait for the prompts of their step, and prompts for those of the steps before. So beside decodes a step is small
while few prompts wait. Large steps compute more tokens a second. They come where many prompts wait, and steps grow
where prompts come faster than small ones compute them. Pure logic.
"""

from __future__ import annotations

SMALL_STEP = 1024
"""Tokens of a step that computes prompts beside decodes, decodes included. A captured graph has as many rows."""
GROWTH = 256
"""Tokens by which such steps grow: as captured graphs of so many rows do."""
GROWS_AFTER = 32
"""Crowded steps, more than others, until steps grow. Prompts that come at once are computed in fewer."""


class StepBudget:
    """Tokens of one engine's steps."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: that any step may have."""
        self._max_tokens = max_tokens
        self._is_small = False
        """Whether the last step was one of those that grow."""
        self._crowding = 0
        """Crowded ones among them, which used up their tokens, less the others; at least 0."""
        self._most_crowding = GROWS_AFTER * -(-max(0, max_tokens - SMALL_STEP) // GROWTH)

    def next_step(self, num_decodes: int, num_prompt_tokens: int) -> int:
        """Tokens of the next step, decodes included. `num_prompt_tokens`: of all prompts that it could compute."""
        self._is_small = num_decodes > 0 and num_prompt_tokens < 2 * self._max_tokens
        if not self._is_small:
            return self._max_tokens
        small = SMALL_STEP + GROWTH * (self._crowding // GROWS_AFTER)
        return min(self._max_tokens, max(small, 2 * num_decodes))  # at least half is for prompts

    def note(self, num_left: int) -> None:
        """Learn how many tokens of the step nothing took."""
        if self._is_small and num_left == 0:
            self._crowding = min(self._crowding + 1, self._most_crowding)
        elif self._is_small and self._crowding:
            self._crowding -= 1
