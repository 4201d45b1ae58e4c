"""Times of one answer, and the line that shows them."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Stats:
    """Counts and times (seconds) of one answer; started when the prompt is ready to be prefilled."""

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0
    finish_reason: str = ""
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    last_token: float = 0.0

    def count_token(self) -> None:
        """Call when a token of the answer arrived."""
        self.last_token = time.perf_counter()
        self.generated_tokens += 1
        if self.generated_tokens == 1:
            self.first_token = self.last_token

    def finish(self, reason: str) -> None:
        """Call when the answer ended."""
        self.finish_reason = reason
        if self.generated_tokens == 0:
            self.first_token = self.last_token = time.perf_counter()

    @property
    def time_to_first_token_s(self) -> float:
        return max(self.first_token - self.started, 0.0)

    @property
    def prompt_tokens_per_s(self) -> float:
        """Tokens prefilled (those from the cache do not count) until the first token came."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.time_to_first_token_s)

    @property
    def generation_tokens_per_s(self) -> float:
        """Tokens after the first, per second since the first; 0 when there is only one."""
        return _rate(self.generated_tokens - 1, self.last_token - self.first_token)

    def line(self, load_s: float) -> str:
        """One line for stderr."""
        reused = f" ({self.cached_tokens} from cache)" if self.cached_tokens else ""
        return (
            f"prompt {self.prompt_tokens} tokens{reused}, {self.prompt_tokens_per_s:.2f} tok/s;"
            f" generation {self.generated_tokens} tokens, {self.generation_tokens_per_s:.2f} tok/s;"
            f" load {load_s:.2f} s; time to first token {self.time_to_first_token_s:.3f} s"
        )

    def as_dict(self, load_s: float) -> dict[str, Any]:
        """For --json."""
        return {
            "load_s": round(load_s, 4),
            "time_to_first_token_s": round(self.time_to_first_token_s, 4),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prompt_tokens_per_s": round(self.prompt_tokens_per_s, 3),
            "generated_tokens": self.generated_tokens,
            "generation_tokens_per_s": round(self.generation_tokens_per_s, 3),
        }


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
