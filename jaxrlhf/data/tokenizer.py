"""A tokenizer whose open questions (BOS, EOS, pad, stop tokens, chat format) are decided once, when it is loaded, and
said in `notes`.

What people write must not become control tokens: `guard` marks the spelling of a control token inside ordinary text,
and `encode_all` reads marked spellings letter by letter. The mark is U+FDD0, a code point that text never holds.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.hf_tokenizer import CHATML, FILES, chat_template, generation_stops, pretrained
from jaxrlhf.errors import DataError

GUARD = "\ufdd0"
_CHUNK = 8192  # texts per call of the backend, whose results are large until they are lists
_CONTEXT = 8  # ids before a continuation that decide whether its first word has a space before it


class Tokenizer:
    """Text to ids and back; made by `load_tokenizer`.

    bos_id: what an empty prompt starts from, if there is one; every plain text starts with it if `adds_bos`.
    eos_id: ends every plain text and completion.        pad_id: fills, and nothing else.
    stop_ids: any of them ends a response.               turn_end: text that ends an assistant turn, "" if none.
    size: the largest id plus one.                       added: how many tokens are new: its last ids.
    notes: the decisions, as lines to print.             origin: folder whose files say all this, None if changed.
    """

    def __init__(self, hf: Any, pad_id: int, stop_ids: Sequence[int], added: int, origin: Path | None) -> None:
        self._hf, self._backend, self._origin = hf, hf.backend_tokenizer, origin
        self._backend.no_truncation()
        self._backend.no_padding()
        special = [str(token) for token in hf.added_tokens_decoder.values() if token.special]
        self.control_tokens = {text: hf.convert_tokens_to_ids(text) for text in {*special, *hf.all_special_tokens}}
        spelt = "|".join(re.escape(text) for text in sorted(self.control_tokens, key=len, reverse=True))
        self._control = re.compile(f"(?<!{GUARD})(?:{spelt or '(?!)'})")
        self.pad_id, self.added = pad_id, added
        self.eos_id: int = hf.eos_token_id
        self.bos_id: int | None = hf.bos_token_id
        self.adds_bos = self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]
        self.size = max(len(hf), *(i + 1 for i in hf.added_tokens_decoder), 0)
        self._anchor, self._anchor_size = self._leading_space_anchor()
        self.has_chat = bool(hf.chat_template)
        self.marks_generation = self.has_chat and bool(re.search(r"\{%-?\s*generation\s*-?%\}", hf.chat_template))
        self.turn_end = self._terminator() if self.has_chat else ""
        stops = [self.eos_id, self.control_tokens.get(self.turn_end), *stop_ids]
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i is not None and i < self.size))
        self.notes = self._decisions()

    def guard(self, text: str) -> str:
        """`text` with the spelling of every control token marked as ordinary text."""
        text = text.replace(GUARD, "")
        while self._control.search(text):  # more than once where spellings overlap
            text = self._control.sub(lambda match: GUARD + match[0], text)
        return text

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, BOS and EOS not added. Control tokens spelt out in it are ordinary text, unless `special`."""
        return self.encode_all([text if special else self.guard(text)])[0]

    def prompt_ids(self, text: str) -> list[int]:
        """A plain prompt as the model expects it: after BOS where the tokenizer says so; empty is BOS alone."""
        if self.bos_id is None and not text:
            raise DataError("an empty prompt starts from the beginning-of-sequence token, and this tokenizer has none")
        bos = [self.bos_id] if self.bos_id is not None and (self.adds_bos or not text) else []
        return bos + self.encode(text)

    def encode_all(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[list[int]]:
        """Ids of each text, all at once. Control tokens count where they are not guarded. A text that `continues` the
        one before it goes without the space that some tokenizers put before the first word of a text."""
        starts = [self._anchor if c else "" for c in continues] or [""] * len(texts)
        plain = [i for i, text in enumerate(texts) if GUARD not in text]
        ids = dict(zip(plain, self._batch([starts[i] + texts[i] for i in plain], False), strict=True))
        for i, text in enumerate(texts):
            if i not in ids:
                ids[i] = self._guarded(starts[i] + text)
        return [ids[i][self._anchor_size :] if starts[i] else ids[i] for i in range(len(texts))]

    def _batch(self, texts: list[str], spell: bool) -> list[list[int]]:
        """spell: control tokens are read as the letters they are written in."""
        self._backend.encode_special_tokens = spell
        parts = (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK))
        return [e.ids for part in parts for e in self._backend.encode_batch_fast(part, add_special_tokens=False)]

    def _guarded(self, text: str) -> list[int]:
        """The control tokens of the text as such, and the text between them letter by letter."""
        ids, start = [], 0
        for match in self._control.finditer(text):
            ids += self._batch([text[start : match.start()].replace(GUARD, "")], True)[0]
            ids.append(self.control_tokens[match[0]])
            start = match.end()
        return ids + self._batch([text[start:].replace(GUARD, "")], True)[0]

    def _leading_space_anchor(self) -> tuple[str, int]:
        """A text (and its number of ids) to put before a continuation and to cut off again, where the tokenizer treats
        the first word of a text differently; ("", 0) where it does not."""
        alone, line, both = self._batch(["a", "\n", "\na"], False)
        return ("\n", len(line)) if both[: len(line)] == line and both[len(line) :] != alone else ("", 0)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Text of `ids` without control tokens. With the ids it comes `after`, the text that it adds to theirs: some
        tokenizers hide the space before a first word."""
        context, own = [int(i) for i in after[-_CONTEXT:]], [int(i) for i in ids]
        before, text = self._backend.decode(context), self._backend.decode(context + own)
        return text[len(before) :] if text.startswith(before) else self._backend.decode(own)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry for each id; ids that only the model's padded vocabulary has read `[id]`."""
        return [self._backend.id_to_token(int(i)) or f"[{i}]" for i in ids]

    def render_chat(self, messages: list[dict[str, Any]], generation: bool) -> list[int]:
        """Ids of a conversation in the chat format; `generation` opens an assistant turn at its end."""
        return self.encode_all([self.render(messages, generation)])[0]

    def render(self, messages: list[dict[str, Any]], generation: bool = False) -> str:
        """The conversation as guarded text: what the template writes may be control tokens, contents never are."""
        return self._render(messages, add_generation_prompt=generation)[0]

    def render_blocks(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """`render`, and the characters that the template marks with {% generation %}."""
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.has_chat
        names: dict[str, Any] = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        try:
            rendered, blocks = render_jinja_template(  # type: ignore[misc]
                conversations=[self._guard_all(messages)], chat_template=self._hf.chat_template, **options, **names
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise DataError(
                f"the chat template fails on a conversation ({error}); name another in tokenizer.chat_template"
            ) from error
        return rendered[0], list(blocks[0]) if blocks else []  # type: ignore[arg-type]

    def _guard_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, dict):
            return {key: self._guard_all(item) for key, item in value.items()}
        return [self._guard_all(item) for item in value] if isinstance(value, list) else value

    def find_turn_end(self, text: str, start: int) -> int | None:
        """Behind the first turn terminator of rendered `text` from `start` on."""
        match = re.compile(f"(?<!{GUARD}){re.escape(self.turn_end)}").search(text, start)
        return match.end() if match else None

    def _terminator(self) -> str:
        answer = "\ufdd1"
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
        match = self._control.match(text.rpartition(answer)[2].lstrip())
        return match[0] if match else ""

    def _decisions(self) -> tuple[str, ...]:
        def name(i: int | None) -> str:
            return f"{self.pieces([i])[0]!r} (id {i})" if i is not None else ""

        if self.bos_id is None:
            bos = "none"
        else:
            bos = name(self.bos_id) + (" begins every plain text" if self.adds_bos else " for empty prompts only")
        reserved = "" if self.pad_id != self.eos_id else " for filling only: it is eos too, and masks come from lengths"
        lines = [
            f"bos: {bos}",
            f"eos: {name(self.eos_id)} ends every plain text",
            f"pad: {name(self.pad_id)}{reserved}",
        ]
        lines.append("stop tokens: " + ", ".join(name(i) for i in self.stop_ids))
        if self.has_chat:
            end = name(self.control_tokens[self.turn_end]) if self.turn_end else "no token of its own; eos is added"
            lines.append(f"chat format: an assistant turn ends with {end}")
        else:
            lines.append("chat format: none, everything is plain text")
        return (*lines, f"new tokens: {self.added}") if self.added else tuple(lines)

    def save(self, directory: Path | str) -> None:
        """Write the tokenizer to a folder: the original files byte for byte if nothing was changed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._origin is not None:
            for name in FILES:
                if (self._origin / name).exists():
                    shutil.copyfile(self._origin / name, directory / name)
            return
        self._hf.save_pretrained(directory)
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business there
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """DataError unless every id of the tokenizer is in a model's vocabulary."""
    if tokenizer.size > vocab_size:
        raise DataError(
            f"the tokenizer has ids up to {tokenizer.size - 1}, the model only {vocab_size} embeddings: "
            "it is the tokenizer of another model; set tokenizer.path to the right one"
        )


def load_tokenizer(path: Path | str, source: TokenizerSource, revision: str | None = None) -> Tokenizer:
    """The tokenizer of `source`, or else of the model at `path` (a folder, never looked up on the network, or a hub
    id). Stop tokens are also taken from the model's generation_config.json. DataError says what to set."""
    hf = pretrained(str(source.path or path), None if source.path else revision)
    own_pad, known = hf.pad_token, len(hf)
    template = chat_template(hf, source)
    changed = template != hf.chat_template or source.eos_token is not None
    hf.chat_template = template
    if template == CHATML:
        hf.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    vocabulary = hf.get_vocab() if source.eos_token or source.pad_token else {}
    for option, token in (("eos_token", source.eos_token), ("pad_token", source.pad_token)):
        if token is not None and token not in vocabulary:
            raise DataError(f"tokenizer.{option}: {token!r} is not in the tokenizer's vocabulary")
    hf.eos_token = source.eos_token or hf.eos_token
    specials = [str(token) for token in hf.added_tokens_decoder.values()]
    if hf.eos_token is None:
        candidates = f", for example {', '.join(map(repr, specials[:5]))}" if specials else ""
        raise DataError(
            f"tokenizer {source.path or path}: it has no end-of-sequence token, so no response could end; "
            f"name one of its tokens in tokenizer.eos_token{candidates}"
        )
    spare = [token for token in specials if re.fullmatch(r"\W*(pad|finetune_right_pad_id|reserved\w*)\W*", token, re.I)]
    hf.pad_token = source.pad_token or own_pad or next(iter(sorted(spare, key=_is_reserved)), hf.eos_token)
    stops = generation_stops(Path(path).expanduser(), str(path), revision)
    origin = Path(source.path or path).expanduser()
    changed = changed or source.pad_token is not None or not origin.is_dir()
    return Tokenizer(hf, hf.pad_token_id, stops, len(hf) - known, None if changed else origin)


def _is_reserved(token: str) -> bool:
    return "reserved" in token.lower()
