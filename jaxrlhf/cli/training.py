"""Commands around training runs. Heavy modules are imported by the commands that need them."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jaxrlhf
from jaxrlhf import stopping
from jaxrlhf.cli import next_steps, supervise
from jaxrlhf.cli.models import Options, Overrides, announce_compilations
from jaxrlhf.config import text as config_text
from jaxrlhf.config.file import METHODS, load_config, method_of, methods_with_sections, presets
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, OutOfMemory
from jaxrlhf.files import kind_of


def _config_path(given: str | None) -> Path | None:
    """The path of a config file or preset. Raises ConfigError if there is none of this name."""
    if given is None or Path(given).is_file():
        return Path(given) if given else None
    if (kind := kind_of(Path(given))) and kind != "a folder":  # a preset may have the name of a folder
        raise ConfigError(f"the config file {given} is {kind}, not a file")
    known, name = presets(), given.removesuffix(".yaml").rstrip("/")
    if name in known:
        return known[name]
    if inside := [other for other in known if other.startswith(f"{name}/")]:
        raise ConfigError(f"{given} is a folder of presets; choose one: {', '.join(inside)}")
    beside = [other for other in known if other.rpartition("/")[0] == name.rpartition("/")[0]]
    names = ", ".join(beside or [other for other in known if "/" not in other])
    raise ConfigError(
        f"there is no config file {given}, nor a preset of that name ({names}){did_you_mean(name, list(known))}"
    )


def train_help(method: str) -> int:
    print(
        f"usage: jaxrlhf {method} CONFIG.yaml [--section.key value ...] [--use-lora] [--fresh] [--restarts N]\n"
        "       [--dry-run] [--debug]\n"
        "       [--distributed [--coordinator-address HOST:PORT --num-processes N --process-id I]]\n"
        "\n"
        f"CONFIG.yaml is a file or the name of a preset; `jaxrlhf new {method}` prints one with all options.\n"
        "Overrides follow it; their values are YAML, and hyphens in names are underscores. A run in an existing run\n"
        "directory is resumed; --fresh starts over. --restarts N starts the run again, up to N times, when it\n"
        "is killed or crashes. --dry-run prints the resolved config, the first batch, and the memory and files of the\n"
        "run. --distributed makes this process one of several that train together."
    )
    print(config_text.render_help(METHODS[method]))
    return 0


def _load_with_options(method: str, path: Path | None, options: Options, overrides: Overrides) -> Any:
    lora = [("lora.enabled", "true")] if options.use_lora else []
    return load_config(method, path, [*lora, *overrides])


def train(options: Options, overrides: Overrides) -> int | None:
    if options.config is None and not overrides:
        print(f"jaxrlhf {options.verb}: give a CONFIG.yaml; `jaxrlhf new {options.verb}` prints one", file=sys.stderr)
        return 2
    if options.restarts:
        return _supervised(options, overrides)
    with stopping.handling(immediate=True):
        return _train(options, overrides)


def _supervised(options: Options, overrides: Overrides) -> int:
    """Run the command in a process of its own, and again if that ends too early."""
    if options.dry_run:
        raise ConfigError("--dry-run starts no run, so --restarts has no use; leave one of them out")
    config = _load_with_options(options.verb, _config_path(options.config), options, overrides)
    command = [sys.executable, "-m", "jaxrlhf", *supervise.without_option(options.words)]
    return supervise.supervise(command, Path(config.run_dir), options.restarts)


def _train(options: Options, overrides: Overrides) -> int:
    began = time.monotonic()
    _join_processes(options)
    config = _load_with_options(options.verb, _config_path(options.config), options, overrides)
    if options.dry_run:
        from jaxrlhf.plan import dry_run

        dry_run.show(config, fresh=options.fresh, colour=_colour())
        return 0
    from jaxrlhf import distributed, runs
    from jaxrlhf.runs import wallclock

    runs.check_processes(config)
    runs.check_run_directory(config, options.verb, options.fresh)
    quiet = config.logging.quiet or not distributed.is_primary()
    with wallclock.command(began), announce_compilations(sys.stdout, quiet=quiet):
        _trainer_class(options.verb)(config, fresh=options.fresh).train()
    if not quiet:
        print("\n".join(["next:", *next_steps.after_training(config)]))
    return 0


def _join_processes(options: Options) -> None:
    """Connect this process with the others of a run on several, before jax uses a device."""
    given = [
        name for name in ("coordinator_address", "num_processes", "process_id") if getattr(options, name) is not None
    ]
    if not options.distributed:
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} has no use without --distributed")
        return
    if options.dry_run:
        raise ConfigError("--dry-run looks at a run in one process; leave --distributed out")
    from jaxrlhf import distributed

    distributed.start(options.coordinator_address, options.num_processes, options.process_id)


def _trainer_class(method: str) -> Any:
    """The trainer whose config is `METHODS[method]`."""
    return getattr(jaxrlhf, METHODS[method].__name__.replace("Config", "Trainer"))


def plan(options: Options, overrides: Overrides) -> int:
    path, method = _config_path(options.config), options.method
    if method is None:
        if path is None:
            raise ConfigError("plan: give a CONFIG.yaml, or --method and overrides")
        method = method_of(path)
    config = _load_with_options(method, path, options, overrides)
    if options.explain:
        return _explain(options.devices, config)
    if options.devices is None:
        from jaxrlhf.plan import report

        fits = report.examine(config, every_knob=options.knobs)
    else:
        fits = _plan_for(options.devices, config, every_knob=options.knobs)
    return 0 if fits else OutOfMemory.exit_code


def _explain(devices: str | None, config: Any) -> int:
    if devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxrlhf.plan import explain, targets

    print(explain.explain(config, targets.parse(devices) if devices else None), flush=True)
    return 0


def _plan_for(devices: str, config: Any, *, every_knob: bool) -> bool:
    """Plan for devices that need not exist; jax itself computes on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # programs for other devices cannot be read back
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # errors are raised; the log would name programs that compile slowly
    from jaxrlhf.plan import report, targets

    target = targets.parse(devices)
    with announce_compilations(sys.stdout, quiet=False):
        return report.examine_target(config, target, every_knob=every_knob)


def demo(options: Options, overrides: Overrides) -> None:
    from jaxrlhf.demo.pipeline import run

    run(Path(options.output), options.seed, quiet=options.quiet)


def doctor(options: Options, overrides: Overrides) -> int:
    if overrides and not options.model:
        raise ConfigError(f"doctor: --{overrides[0][0]} configures a run; give the MODEL to check first")
    model = [("model.path", options.model)] if options.model else []
    config = load_config("ppo", _config_path(options.config), [*overrides, *model], partial=True)
    from jaxrlhf import doctor

    return 0 if doctor.examine(config) else 1


def new(options: Options, overrides: Overrides) -> None:
    print(config_text.render_new(options.method, METHODS[options.method]), end="")


def data(options: Options, overrides: Overrides) -> None:
    if options.file.endswith((".yaml", ".yml")):
        methods = methods_with_sections(Path(options.file))  # all read the section `data` alike
        run = load_config(methods[0] if methods else "sft", Path(options.file), overrides, partial=True)
        whole = {"completion_only": run.completion_only} if run.method == "sft" else {}
        config = METHODS["sft"](model=run.model, tokenizer=run.tokenizer, data=run.data, **whole)
    else:
        config = load_config("sft", None, [("data.path", options.file), *overrides], partial=True)
    from jaxrlhf import doctor

    print(doctor.examine_data(config, colour=_colour(), ids=options.ids))


def _colour() -> bool:
    """Standard output shows colours, and they are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plot(options: Options, overrides: Overrides) -> None:
    from jaxrlhf.metrics import plots

    output = Path(options.output) if options.output else None
    for path in plots.plot([Path(run) for run in options.run], output, options.format):
        print(path)


def report(options: Options, overrides: Overrides) -> None:
    from jaxrlhf import report

    print(report.write(Path(options.run), Path(options.output) if options.output else None))
