"""The command `chat`."""

import json
import sys

from jaxrlhf.cli.models import (
    Options,
    Overrides,
    announce_compilations,
    date_of_run,
    environment_of_run,
    overrides_from_run,
)
from jaxrlhf.config.file import load_config
from jaxrlhf.errors import ConfigError, JaxrlhfError

RESPONSE_LENGTH = 256
"""Tokens of a reply, unless the options or the run say otherwise."""


def chat(options: Options, overrides: Overrides) -> None:
    asked = any(key.startswith("reward.") for key, _ in overrides)
    run = overrides_from_run(options.model, *["sampling"] if asked else ["sampling", "reward"])
    run = [("sampling.response_length", str(RESPONSE_LENGTH)), *run, *date_of_run(options.model)]
    config = load_config("ppo", None, [*run, ("model.path", options.model), *overrides], partial=True)
    if config.environment.function:
        raise ConfigError(
            f"chat plays no environment, and environment.function is {config.environment.function}; leave it out, or "
            "use generate or evaluate, which play it"
        )
    environment = dict(environment_of_run([options.model], overrides)).get("environment.function")
    if environment:
        print(
            f"note: the run was trained with an environment, {json.loads(environment)}, which chat does not play: what "
            "it would answer is yours to write. generate and evaluate play it",
            file=sys.stderr,
        )
    from jaxrlhf.chat.conversation import Conversation
    from jaxrlhf.chat.terminal import Terminal

    with announce_compilations(sys.stderr, quiet=config.logging.quiet):
        conversation = Conversation(config, options.system or "", history=not options.no_history)
        if config.reward.parts():
            try:
                conversation.open_reward()
            except JaxrlhfError as error:
                if asked:
                    raise
                print(f"note: replies are not scored, as the run's reward cannot be used: {error}", file=sys.stderr)
        elif not environment and overrides_from_run(options.model, "reward", methods=("ppo", "grpo")):
            print(
                "note: replies are not scored: the run's config names no reward. If it was given in Python, give its "
                "file and name: --reward.function FILE.py:NAME",
                file=sys.stderr,
            )
        conversation.warm_up()
        Terminal(conversation).run()
