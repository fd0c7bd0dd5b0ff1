"""Speed: how fast a worker computes, from its steps. What does not live here: the steps themselves (`compute`)."""

from __future__ import annotations

from collections import deque


class Speed:
    """Tokens a second over the last `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._computed: deque[tuple[float, int]] = deque()

    def add(self, now: float, tokens: int) -> None:
        """So many were computed until now."""
        self._computed.append((now, tokens))

    def per_second(self, now: float) -> float:
        """0 until there were two steps."""
        while self._computed and self._computed[0][0] < now - self._window_s:
            self._computed.popleft()
        if len(self._computed) < 2:
            return 0.0
        return sum(tokens for _, tokens in list(self._computed)[1:]) / max(1e-3, now - self._computed[0][0])
