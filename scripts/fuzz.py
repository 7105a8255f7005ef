"""Fuzz a reader of files that others have written, guided by the coverage of the code (needs `pip install atheris`).

    python scripts/fuzz.py rows --minutes 10      # or: adapter, checkpoint, config, records, safetensors, template

Inputs begin as valid files and are mutated. What counts: an exception that is not one of ours (a crash; its input is
kept in `fuzz/`, one for each place in the code), a call that takes more than 2 s of processor time or 30 s in all (a
hang), and the growth of the process's memory since its first 1,000 inputs. Exit code 1: there was a crash or a hang.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS = 2.0, 30.0
WARM_UP = 1000  # inputs, after which memory is first measured
LONGEST = 32_000  # bytes of an input
FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures"
INSTRUMENTED = ["jaxrlhf", "jinja2", "yaml", "json"]
WORDS = [
    *("null", "true", "false", "NaN", "Infinity", "-1", "1e308", "9223372036854775808", '""', "[]", "{}", '"\\ud800"'),
    *('"\\u0000"', '"../x"', '"${HOME}"', "[[[[[[[[", '{"a":', "&a", "*a", "<<: ", "!!python/object:", "|\\n", "- "),
    *('"prompt"', '"chosen"', '"rejected"', '"messages"', '"role"', '"content"', '"completion"', '"label"', '"text"'),
    *("{%", "%}", "{{", "}}", "{% for m in messages %}", "{% endfor %}", "{% set ", "namespace(", "range(", "| tojson"),
    *("{% generation %}", "{% endgeneration %}", "raise_exception(", "strftime_now(", ".__class__", " ~ ", " ** "),
    *('"F32"', '"BF16"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', ":float32:", ":bfloat16:0x3"),
]
Reader = Callable[[bytes], Any]


def rows(folder: Path) -> tuple[list[bytes], Reader]:
    """JSONL, and what its columns mean."""
    from jaxrlhf.config import Data
    from jaxrlhf.data import examples, formats, sources
    from jaxrlhf.errors import JaxrlhfError

    file = folder / "rows.jsonl"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        config = Data(path=str(file))
        found = sources.read_rows(config)
        for task in ("sft", "pairs", "prompts"):
            with contextlib.suppress(JaxrlhfError):
                layout = formats.recognise(found, task, config)
                for i in range(len(found.rows)):
                    examples.to_examples(found, i, layout, config, True, lambda text: text, Counter())

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    seeds: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "c", "rejected": "r", "score_chosen": 1.5},
        {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"prompt": "q", "completion": "a", "label": True},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"instruction": "i", "input": "x", "output": "o"},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
    ]
    return [b"\n".join([json.dumps(row).encode()] * 2) for row in seeds], read


def config(folder: Path) -> tuple[list[bytes], Reader]:
    """Config files; the first byte chooses the method."""
    from jaxrlhf.config.file import METHODS, load_config, presets

    file, methods = folder / "config.yaml", sorted(METHODS)

    def read(content: bytes) -> None:
        file.write_bytes(content[1:])
        load_config(methods[content[0] % len(methods)] if content else "sft", file, partial=True)

    return [bytes([i]) + presets()[name].read_bytes() for i, name in enumerate(methods) if name in presets()], read


def template(folder: Path) -> tuple[list[bytes], Reader]:
    """Chat templates, rendered as a run does, and before it compiled in this process to see new code."""
    import types

    from jaxrlhf.config import TokenizerSource
    from jaxrlhf.data import chat_template, template_process

    chat_template.SECONDS = 1.0
    file, here = folder / "t.jinja", template_process.Templates()
    hf = types.SimpleNamespace(special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}, chat_template="")
    hf.get_chat_template = lambda name, tools: hf.chat_template
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "tool_calls": [{"name": "f"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]

    def read(content: bytes) -> None:
        with contextlib.suppress(Exception):  # of any kind: here it is the reply of the other process that counts
            here.variables([content.decode("utf-8", "replace")])
        file.write_bytes(content)
        hf.chat_template = chat_template.select_chat_template(hf, TokenizerSource(chat_template=str(file)))
        chat_template.ChatTemplate(hf, {}, "2026-01-02").render(talk, tools, add_generation_prompt=True)

    lines = [
        chat_template.CHATML,
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ bos_token }}{{ strftime_now('%d %b %Y') }}",
        "{%- set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% break %}{% endfor %}{{ n.i }}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(messages[0]['content'] ~ 'x' * 3) }}",
    ]
    return [line.encode() for line in lines], read


def safetensors(folder: Path) -> tuple[list[bytes], Reader]:
    """Files of weights. If the first of the 8 bytes of the length is odd, the length is made that of the header."""
    from jaxrlhf.weights import safetensors as reader

    file = folder / "model.safetensors"

    def read(content: bytes) -> None:
        if content[:1] and content[0] % 2 and b"}}" in content[8:]:
            content = (content.rindex(b"}}") + 2 - 8).to_bytes(8, "little") + content[8:]
        file.write_bytes(content)
        for entry in reader.scan_folder(folder).values():
            reader.read(entry)

    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    seeds = []
    for fields in (header, header | {"__metadata__": {"format": "pt"}}, {}):
        text = json.dumps(fields).encode()
        seeds.append(len(text).to_bytes(8, "little") + text + bytes(range(32)) * bool(fields))
    return [*seeds, *(b"\1" + seed[1:] for seed in seeds)], read


def adapter(folder: Path) -> tuple[list[bytes], Reader]:
    """adapter_config.json, beside weights of adapters that fit a model."""
    from jaxrlhf.weights import peft
    from jaxrlhf.weights.families import parse

    models = {}
    for name, family in (("llama-lora", "llama"), ("gpt2-dora-rslora", "gpt2")):
        shutil.copytree(FIXTURES / "adapters" / name, folder / name)
        model = json.loads((FIXTURES / "models" / family / "config.json").read_text())
        models[folder / name] = parse(model, "config.json")

    def read(content: bytes) -> None:
        for place, model in models.items():
            (place / "adapter_config.json").write_bytes(content)
            peft.base_of(place)
            peft.read(place, model)

    return [(place / "adapter_config.json").read_bytes() for place in models], read


def checkpoint(folder: Path) -> tuple[list[bytes], Reader]:
    """The files of a checkpoint that are not arrays. The first byte chooses the file; a record is sealed again."""
    from jaxrlhf.checkpoint import storage
    from jaxrlhf.checkpoint.digest import with_seal

    shutil.copytree(FIXTURES / "runs" / "ppo" / "run" / "checkpoints", folder / "checkpoints")
    whole = folder / "checkpoints" / "2"
    files = [file for file in sorted(whole.rglob("*")) if file.is_file() and file.parent.name != "d"]
    files.sort(key=lambda file: file.name != "data.json")
    original = {file: file.read_bytes() for file in files}

    def read(content: bytes) -> None:
        at = content[0] if content else 0
        file = files[at % len(files)] if at < 128 else files[0]
        content = content[1:]
        if file is files[0]:
            with contextlib.suppress(Exception):
                content = json.dumps(with_seal(json.loads(content))).encode()
        file.write_bytes(content)
        try:
            storage.stored_shapes(whole.parent, 2, "params")
            storage.verify(whole.parent, 2)
        finally:
            file.write_bytes(original[file])

    return [bytes([i]) + original[file] for i, file in enumerate(files)], read


def records(folder: Path) -> tuple[list[bytes], Reader]:
    """What a run has recorded, without the arrays of its checkpoints. The first byte chooses: the record of a
    checkpoint, as it is or sealed again, with what it says is left to do; run.json; a log, which is also cut back to
    its second step."""
    from jaxrlhf.checkpoint import storage
    from jaxrlhf.checkpoint.digest import with_seal
    from jaxrlhf.metrics import lines
    from jaxrlhf.runs.record import read_record
    from jaxrlhf.training.unfinished import PENDING, UNDRAWN, left_to_do, pending

    source = FIXTURES / "runs" / "ppo" / "run"
    stored = json.loads((source / "checkpoints" / "2" / storage.RECORD).read_bytes())
    left = {PENDING: {"record": {"loss": 1.5, "eval/loss": "nan"}, "samples": [{"prompt": "p"}]}, UNDRAWN: 1}
    stored |= {"leaves": dict(list(stored["leaves"].items())[:6]), "extra": stored["extra"] | left}
    stored = with_seal(stored)
    file = folder / "2" / storage.RECORD
    file.parent.mkdir(parents=True)

    def of_checkpoint(content: bytes) -> None:
        file.write_bytes(content)
        storage.stored_shapes(folder, 2, "params")
        pending(left_to_do(storage.read_record(folder, 2)["extra"]))

    def sealed(content: bytes) -> None:
        with contextlib.suppress(Exception):
            content = json.dumps(with_seal(json.loads(content))).encode()
        of_checkpoint(content)

    def of_run(content: bytes) -> None:
        (folder / "run.json").write_bytes(content)
        read_record(folder)

    def log(content: bytes) -> None:
        (folder / "metrics.jsonl").write_bytes(content)
        for every in (True, False):
            kept, _ = lines.up_to(folder / "metrics.jsonl", 2, every=every, of_end=1)
            (folder / "kept.jsonl").write_bytes(b"".join(kept))
            assert all(record["step"] <= 2 for record in lines.read_records(folder / "kept.jsonl"))
        lines.read_records(folder / "metrics.jsonl")

    readers = (of_checkpoint, sealed, of_run, log)
    originals = [json.dumps(stored).encode()] * 2
    originals += [(source / name).read_bytes() for name in ("run.json", "metrics.jsonl")]

    def read(content: bytes) -> None:
        readers[content[0] % len(readers) if content else 0](content[1:])

    seeds = [bytes([i]) + original for i, original in enumerate(originals)]
    return [*seeds, bytes([3]) + originals[3].decode().encode("utf-16")], read


TARGETS = {made.__name__: made for made in (adapter, checkpoint, config, records, rows, safetensors, template)}


class Tally:
    """Calls a reader and counts."""

    def __init__(self, name: str, read: Reader, seconds: float, output: Path) -> None:
        self.name, self.read, self.seconds, self.output = name, read, seconds, output
        self.executions, self.hangs, self.slowest, self.memory = 0, 0, 0.0, 0
        self.crashes: Counter[str] = Counter()
        self.started = time.monotonic()

    def __call__(self, content: bytes) -> None:
        from jaxrlhf.errors import JaxrlhfError

        cpu, wall = time.process_time(), time.monotonic()
        try:
            self.read(content)
        except JaxrlhfError:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self._keep(f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}", content)
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        self.slowest = max(self.slowest, cpu)
        if self.executions and (cpu > CPU_SECONDS or wall > WALL_SECONDS):  # the first call imports
            self.hangs += 1
            self._keep("hang", content)
        self.executions += 1
        if self.executions == WARM_UP:
            self.memory = resident()
        if time.monotonic() - self.started > self.seconds:
            self.finish()

    def _keep(self, place: str, content: bytes) -> None:
        self.crashes[place] += place != "hang"
        if self.crashes[place] <= 1:
            self.output.mkdir(exist_ok=True)
            (self.output / f"{self.name} {place.replace('/', '_')}").write_bytes(content)
            if place != "hang":
                traceback.print_exc()

    def finish(self) -> None:
        """Print the result and end the process, which libFuzzer would not."""
        found = sum(count > 0 for count in self.crashes.values())
        grown = f"grew by {(resident() - self.memory) / 2**20:.0f} MB" if self.memory else "was not measured"
        print(
            f"{self.name}: {self.executions:,} inputs in {(time.monotonic() - self.started) / 60:.1f} min, "
            f"{found} crashes, {self.hangs} hangs (slowest {self.slowest:.2f} s), memory {grown}",
            *(f"\n  {count} x {place}" for place, count in self.crashes.items() if count),
            flush=True,
        )
        os._exit(int(bool(found or self.hangs)))


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def dictionary(words: Iterable[str]) -> str:
    """Words as libFuzzer reads them."""
    return "".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--output", type=Path, default=Path("fuzz"), help="folder for inputs that crash or hang")
    options = parser.parse_args()
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        sys.exit("scripts/fuzz.py needs atheris: pip install atheris (Linux and macOS)")
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    output = options.output.resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, atheris.instrument_imports(include=INSTRUMENTED):
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        seeds, read = TARGETS[options.target](Path(folder))
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        Path(folder, "words").write_text(dictionary(WORDS))
        tally = Tally(options.target, read, 60 * options.minutes, output)
        limits = [f"-max_len={LONGEST}", "-timeout=120", "-rss_limit_mb=8192", f"-dict={folder}/words"]
        atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", *limits], tally)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
