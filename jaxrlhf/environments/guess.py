"""A guessing game: find a number from hints."""

import random
import re

_NUMBER = re.compile(r"\d{1,9}")


class GuessNumber:
    """A secret number from `low` to `high`: each turn is a guess, answered with `higher` or `lower`, until it is right.

    The last number of a turn is the guess. The right one has reward 1 and ends the episode; any other turn has reward
    -`turn_cost`, and one without a number is answered with `unclear`.

    Args:
        low, high: range of the secret number, which the seed of the episode gives, or the column `secret` of the data.
        turn_cost: subtracted from the reward for each wrong guess.
        higher, lower, unclear: the hints.
    """

    def __init__(
        self,
        low: int = 1,
        high: int = 10,
        turn_cost: float = 0.0,
        higher: str = "higher",
        lower: str = "lower",
        unclear: str = "a number please",
    ) -> None:
        if low > high:
            raise ValueError(f"low is {low} and high {high}; low must not be above high")
        self._range, self._cost = (low, high), turn_cost
        self._hints = higher, lower, unclear

    def reset(self, seed: int, secret: int | None = None) -> int:
        return random.Random(seed).randint(*self._range) if secret is None else int(secret)

    def step(self, state: int, completion: str) -> tuple[str | None, float]:
        higher, lower, unclear = self._hints
        guesses = _NUMBER.findall(completion)
        if not guesses:
            return unclear, -self._cost
        guess = int(guesses[-1])
        if guess == state:
            return None, 1.0
        return (higher if guess < state else lower), -self._cost
