"""The tokenizer: BOS, EOS, pad, stop tokens and chat template are decided once, at loading, and listed in `notes`.

Text of a data set must not produce control tokens. `escape` puts a mark before every control token spelt in ordinary
text, and `encode_batch` encodes marked spellings character by character. The mark is U+FDD0, a Unicode noncharacter.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.hf_tokenizer import CHATML, FILES, from_pretrained, generation_stops, select_chat_template
from jaxrlhf.errors import DataError

Objects = list[dict[str, Any]]
ESCAPE = "\ufdd0"
_BATCH = 8192  # texts per call of the backend, whose encodings take much more memory than lists of ids
_CONTEXT = 8  # preceding ids that decide whether a continuation starts with a space


class Tokenizer:
    """Text to ids and back; create it with `load_tokenizer`.

    bos_id: starts an empty prompt, None if there is none; starts every plain text if `adds_bos`.
    eos_id: ends every plain text and completion.        pad_id: fills padding, which masks exclude.
    stop_ids: each of them ends a response.              turn_end: text that ends an assistant turn, "" if none.
    size: the largest id plus one.                       added: number of new tokens, which have the last ids.
    notes: the decisions, as lines to print.             origin: folder to copy on `save`, None if anything changed.
    """

    def __init__(self, hf: Any, pad_id: int, stop_ids: Sequence[int], added: int, origin: Path | None) -> None:
        self._hf, self._backend, self._origin = hf, hf.backend_tokenizer, origin
        self._backend.no_truncation()
        self._backend.no_padding()
        special = [str(token) for token in hf.added_tokens_decoder.values() if token.special]
        self.control_tokens = {text: hf.convert_tokens_to_ids(text) for text in {*special, *hf.all_special_tokens}}
        spellings = "|".join(re.escape(text) for text in sorted(self.control_tokens, key=len, reverse=True))
        self._control = re.compile(f"(?<!{ESCAPE})(?:{spellings or '(?!)'})")
        self.pad_id, self.added = pad_id, added
        self.eos_id: int = hf.eos_token_id
        self.bos_id: int | None = hf.bos_token_id
        self.adds_bos = self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]
        self.size = max(len(hf), *(i + 1 for i in hf.added_tokens_decoder), 0)
        self._anchor, self._anchor_size = self._leading_space_anchor()
        self.has_chat = bool(hf.chat_template)
        self.marks_generation = self.has_chat and bool(re.search(r"\{%-?\s*generation\s*-?%\}", hf.chat_template))
        self.turn_end = self._find_turn_end_token() if self.has_chat else ""
        stops = [self.eos_id, self.control_tokens.get(self.turn_end), *stop_ids]
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i is not None and i < self.size))
        self.notes = self._decisions()

    def escape(self, text: str) -> str:
        """Mark the control tokens spelt in `text` as ordinary text."""
        text = text.replace(ESCAPE, "")
        while self._control.search(text):  # repeated, because spellings can overlap
            text = self._control.sub(lambda match: ESCAPE + match[0], text)
        return text

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encode without BOS and EOS. Control tokens spelt in `text` are ordinary text unless `special`."""
        return self.encode_batch([text if special else self.escape(text)])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a plain text prompt, after BOS if the tokenizer adds it; an empty prompt is BOS alone."""
        if self.bos_id is None and not text:
            raise DataError("an empty prompt needs a beginning-of-sequence token, and this tokenizer has none")
        bos = [self.bos_id] if self.bos_id is not None and (self.adds_bos or not text) else []
        return bos + self.encode(text)

    def encode_batch(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[list[int]]:
        """Encode texts; unescaped control tokens become their ids. A text that `continues` the one before it gets no
        leading space, which some tokenizers put before the first word."""
        prefixes = [self._anchor if c else "" for c in continues] or [""] * len(texts)
        unescaped = [i for i, text in enumerate(texts) if ESCAPE not in text]
        ids = dict(zip(unescaped, self._encode([prefixes[i] + texts[i] for i in unescaped], False), strict=True))
        for i, text in enumerate(texts):
            if i not in ids:
                ids[i] = self._encode_escaped(prefixes[i] + text)
        return [ids[i][self._anchor_size :] if prefixes[i] else ids[i] for i in range(len(texts))]

    def _encode(self, texts: list[str], control_as_text: bool) -> list[list[int]]:
        self._backend.encode_special_tokens = control_as_text
        batches = (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH))
        return [e.ids for batch in batches for e in self._backend.encode_batch_fast(batch, add_special_tokens=False)]

    def _encode_escaped(self, text: str) -> list[int]:
        """Encode unescaped control tokens as their ids and everything between them as ordinary text."""
        ids, start = [], 0
        for match in self._control.finditer(text):
            ids += self._encode([text[start : match.start()].replace(ESCAPE, "")], True)[0]
            ids.append(self.control_tokens[match[0]])
            start = match.end()
        return ids + self._encode([text[start:].replace(ESCAPE, "")], True)[0]

    def _leading_space_anchor(self) -> tuple[str, int]:
        """Return a text (and its number of ids) that is put before a continuation and cut off after encoding, so that
        no leading space is added; ("", 0) if the tokenizer adds none."""
        alone, line, both = self._encode(["a", "\n", "\na"], False)
        return ("\n", len(line)) if both[: len(line)] == line and both[len(line) :] != alone else ("", 0)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """Decode without control tokens. Give the preceding ids as `after` to keep a leading space, which some
        tokenizers drop before the first word."""
        context, own = [int(i) for i in after[-_CONTEXT:]], [int(i) for i in ids]
        before, text = self._backend.decode(context), self._backend.decode(context + own)
        return text[len(before) :] if text.startswith(before) else self._backend.decode(own)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary entry of each id, or `[id]` for ids in the model's vocabulary padding."""
        return [self._backend.id_to_token(int(i)) or f"[{i}]" for i in ids]

    def render_chat(self, messages: Objects, generation: bool, tools: Objects | None = None) -> list[int]:
        """Encode a conversation with the chat template; `generation` opens an assistant turn at the end."""
        return self.encode_batch([self.render(messages, generation, tools)])[0]

    def render(self, messages: Objects, generation: bool = False, tools: Objects | None = None) -> str:
        """Apply the chat template. Messages and tools are escaped, so only the template adds control tokens."""
        return self._render(messages, tools, add_generation_prompt=generation)[0]

    def render_with_spans(self, messages: Objects, tools: Objects | None = None) -> tuple[str, list[tuple[int, int]]]:
        """`render`, and the (start, end) characters of the {% generation %} blocks of the template."""
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def _render(self, messages: Objects, tools: Objects | None, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.has_chat
        names: dict[str, Any] = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        try:
            rendered, spans = render_jinja_template(  # type: ignore[misc]
                conversations=[self._escape_all([{k: v for k, v in m.items() if k != "train"} for m in messages])],
                tools=self._escape_all(tools),
                chat_template=self._hf.chat_template,
                **options,
                **names,
            )
        except Exception as error:  # a template is a program and can raise anything
            raise DataError(
                f"the chat template fails on a conversation ({error}); give another one in tokenizer.chat_template"
            ) from error
        return rendered[0], list(spans[0]) if spans else []  # type: ignore[arg-type]

    def _escape_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {key: self._escape_all(item) for key, item in value.items()}
        return [self._escape_all(item) for item in value] if isinstance(value, list) else value

    def find_turn_end(self, text: str, start: int) -> int | None:
        """Find the first end-of-turn token in rendered `text` from `start` on and return the index after it."""
        match = re.compile(f"(?<!{ESCAPE}){re.escape(self.turn_end)}").search(text, start)
        return match.end() if match else None

    def _find_turn_end_token(self) -> str:
        content = "\ufdd1"
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": content}])
        match = self._control.match(text.rpartition(content)[2].lstrip())
        return match[0] if match else ""

    def _decisions(self) -> tuple[str, ...]:
        def name(i: int) -> str:
            return f"{self.convert_ids_to_tokens([i])[0]!r} (id {i})"

        bos = "none"
        if self.bos_id is not None:
            bos = name(self.bos_id) + (", starts every plain text" if self.adds_bos else ", for empty prompts only")
        pad = name(self.pad_id) + (", same as eos; masks come from lengths" if self.pad_id == self.eos_id else "")
        chat = "none, everything is plain text"
        if self.has_chat:
            end = name(self.control_tokens[self.turn_end]) if self.turn_end else "eos, which is added"
            chat = f"an assistant turn ends with {end}"
        lines = [
            f"bos: {bos}",
            f"eos: {name(self.eos_id)}, ends every plain text",
            f"pad: {pad}",
            f"stop tokens: {', '.join(map(name, self.stop_ids))}",
            f"chat template: {chat}",
        ]
        return (*lines, f"new tokens: {self.added}") if self.added else tuple(lines)

    def save(self, directory: Path | str) -> None:
        """Write the tokenizer to a folder; an unchanged one is copied byte for byte."""
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
        for key in ("is_local", "local_files_only"):  # describe this machine, not the tokenizer
            config.pop(key, None)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError unless every id of the tokenizer is in a model's vocabulary."""
    if tokenizer.size > vocab_size:
        raise DataError(
            f"the tokenizer has ids up to {tokenizer.size - 1}, the model only {vocab_size} embeddings, so they do not "
            "belong together; set tokenizer.path to the model's tokenizer"
        )


def load_tokenizer(path: Path | str, source: TokenizerSource, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of `source.path`, by default that of the model at `path` (a folder, which needs no network, or
    a hub id). The model's generation_config.json adds stop tokens. Raises DataError that says what to set."""
    hf = from_pretrained(str(source.path or path), None if source.path else revision)
    original_pad, original_size = hf.pad_token, len(hf)
    template = select_chat_template(hf, source)
    changed = template != hf.chat_template or source.eos_token is not None or source.pad_token is not None
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
    hf.pad_token = source.pad_token or original_pad or _spare_token(specials) or hf.eos_token
    stops = generation_stops(Path(path).expanduser(), str(path), revision)
    origin = Path(source.path or path).expanduser()
    added = len(hf) - original_size
    return Tokenizer(hf, hf.pad_token_id, stops, added, origin if origin.is_dir() and not changed else None)


def _spare_token(specials: list[str]) -> str | None:
    """Find an unused token for padding; one named after padding goes before a reserved one."""
    pattern = re.compile(r"\W*(pad|finetune_right_pad_id|reserved\w*)\W*", re.IGNORECASE)
    spare = [token for token in specials if pattern.fullmatch(token)]
    return min(spare, key=lambda token: "reserved" in token.lower(), default=None)
