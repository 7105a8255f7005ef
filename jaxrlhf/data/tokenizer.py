"""The tokenizer: BOS, EOS, pad, stop tokens and chat template are decided once, at loading, and listed in `notes`.

Text of a data set must not produce control tokens. `escape` puts a mark before every control token spelt in ordinary
text, and `encode_batch` encodes marked spellings character by character. The mark is U+FDD0, a Unicode noncharacter.
"""

import copy
import datetime
import functools
import hashlib
import json
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config import TokenizerSource
from jaxrlhf.data.chat_template import CHATML, ChatTemplate, select_chat_template
from jaxrlhf.data.hf_tokenizer import FILES, MORE_TEMPLATES, from_pretrained, generation_stops
from jaxrlhf.errors import DataError

Objects = list[dict[str, Any]]
Span = tuple[int, int]
ESCAPE = "\ufdd0"
_JSON_ESCAPE = "\\ufdd0"
_BATCH = 8192  # texts per call of the backend, whose encodings take much more memory than lists of ids
_PROBE = "Hello, world!  naïve 1234\n\tdef f(x): return x\n"
_CONTEXT = 8  # preceding ids that decide whether a continuation starts with a space


class Encoding(NamedTuple):
    """Ids of a text, and the characters [start, end) that each stands for."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Tokenizer:
    """Text to ids and back; create it with `load_tokenizer`.

    bos_id: starts an empty prompt, None if there is none; starts every plain text if `adds_bos`.
    eos_id: ends every plain text and completion.        pad_id: fills padding, which masks exclude.
    stop_ids: each of them ends a response.              turn_end: text that ends an assistant turn, "" if none.
    end_ids: `eos_id` and the token of `turn_end`, which end plain texts and turns.
    size: the largest id plus one.                       added: number of new tokens, which have the last ids.
    notes: the decisions, as lines to print.             origin: folder to copy on `save`, None if anything changed.
    template_date: today in its chat template.           template_digest: a hash of that, "" if there is none.
    """

    def __init__(
        self,
        hf: Any,
        source: TokenizerSource,
        pad_id: int,
        stop_ids: Sequence[int],
        added: int,
        origin: Path | None,
        *,
        stores_pad: bool = True,
    ) -> None:
        self._hf, self._backend, self._source, self._origin = hf, hf.backend_tokenizer, source, origin
        self._stores_pad = stores_pad  # False: the files of `origin` name no pad token
        self.template_date = source.template_date or str(datetime.date.today())
        self._template = ChatTemplate(hf, source.template_kwargs, self.template_date) if hf.chat_template else None
        self.train_empty_thinking = source.train_empty_thinking
        self._backend.no_truncation()
        self._backend.no_padding()
        special = [str(token) for token in hf.added_tokens_decoder.values() if token.special]
        self.control_tokens = {text: hf.convert_tokens_to_ids(text) for text in {*special, *hf.all_special_tokens}}
        by_length = sorted(self.control_tokens, key=len, reverse=True)
        self._spellings = "|".join(map(re.escape, by_length)) or "(?!)"
        self._control = re.compile(f"(?<!{ESCAPE})(?:{self._spellings})")
        self.pad_id, self.added = pad_id, added
        self.eos_id: int = hf.eos_token_id
        self.bos_id: int | None = hf.bos_token_id
        self.adds_bos = self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]
        self.size = max(len(hf), *(i + 1 for i in hf.added_tokens_decoder), 0)
        self._anchor, self._anchor_size = self._leading_space_anchor()
        self._spaces_segments = bool(self._anchor) and self._spaces_after_control_tokens()
        self.has_chat = self._template is not None
        self.marks_generation = self._template is not None and self._template.marks_generation
        self.template_digest = self._template.digest if self._template else ""
        self.turn_end = self._find_turn_end_token() if self.has_chat else ""
        self.end_ids = {self.eos_id, self.control_tokens.get(self.turn_end, self.eos_id)}
        stops = [self.eos_id, *self.end_ids, *stop_ids]
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i < self.size))
        self.notes = self._decisions()

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all that decides the tokens of a text or conversation."""
        template = str(self._hf.chat_template or "")
        date = self.template_date if "date" in template or "strftime" in template else ""
        special = self.bos_id, self.eos_id, sorted(self.end_ids), self.adds_bos, sorted(self.control_tokens.items())
        parts = self._backend.to_str(), self.template_digest, template, date, self.train_empty_thinking, special
        return hashlib.sha256(repr(parts).encode()).hexdigest()

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
        return [ids for ids, _ in self._encode_escaped(texts, continues)]

    def encode_with_offsets(self, texts: Sequence[str], continues: Sequence[bool] = ()) -> list[Encoding]:
        """`encode_batch`, with the characters of the escaped text that each token stands for."""
        return [
            Encoding(ids, [start for start, _ in offsets], [end for _, end in offsets])
            for ids, offsets in self._encode_escaped(texts, continues, offsets=True)
        ]

    def _encode_escaped(
        self, texts: Sequence[str], continues: Sequence[bool], *, offsets: bool = False
    ) -> Iterator[tuple[list[int], list[Span]]]:
        """(ids, character spans if asked for) of each text."""
        for first in range(0, len(texts), _BATCH):
            batch = texts[first : first + _BATCH]
            continued = [*continues[first : first + _BATCH]] or [False] * len(batch)
            whole = [i for i, text in enumerate(batch) if ESCAPE not in text]
            encoded = iter(self._encode([batch[i] for i in whole], [continued[i] for i in whole], offsets=offsets))
            for text, continues_text in zip(batch, continued, strict=True):
                yield self._encode_segments(text, continues_text) if ESCAPE in text else next(encoded)

    def _encode(
        self, texts: list[str], continues: list[bool], *, control_as_text: bool = False, offsets: bool = False
    ) -> Iterator[tuple[list[int], list[Span]]]:
        """(ids, character spans if asked for) of texts without escapes."""
        self._backend.encode_special_tokens = control_as_text
        prefixes = [self._anchor if c else "" for c in continues]
        texts = [prefix + text for prefix, text in zip(prefixes, texts, strict=True)]
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        for prefix, encoding in zip(prefixes, encode(texts, add_special_tokens=False), strict=True):
            skip, size = (self._anchor_size, len(prefix)) if prefix else (0, 0)
            spans = [(start - size, end - size) for start, end in encoding.offsets[skip:]] if offsets else []
            yield encoding.ids[skip:], spans

    def _encode_segments(self, text: str, continues: bool) -> tuple[list[int], list[Span]]:
        """Encode unescaped control tokens as their ids and the segments between them as ordinary text."""
        ids, offsets, start = [], [], 0
        for match in [*self._control.finditer(text), None]:
            segment = text[start : match.start() if match else len(text)]
            kept = [start + i for i, character in enumerate(segment) if character != ESCAPE]
            continued = not self._spaces_segments if start else continues
            new, spans = next(
                self._encode([segment.replace(ESCAPE, "")], [continued], control_as_text=True, offsets=True)
            )
            ids += new
            offsets += [(kept[a], kept[b - 1] + 1 if b > a else kept[a]) for a, b in spans]
            if match:
                ids.append(self.control_tokens[match[0]])
                offsets.append(match.span())
                start = match.end()
        return ids, offsets

    def _leading_space_anchor(self) -> tuple[str, int]:
        """Return a text (and its number of ids) that is put before a continuation and cut off after encoding, so that
        no leading space is added; ("", 0) if the tokenizer adds none."""
        self._anchor = ""
        alone, line, both = self.encode_batch(["a", "\n", "\na"])
        return ("\n", len(line)) if both[: len(line)] == line and both[len(line) :] != alone else ("", 0)

    def _spaces_after_control_tokens(self) -> bool:
        """Return True if a leading space is also put before the first word after a control token."""
        control = self.convert_ids_to_tokens([self.eos_id])[0]
        (_, *after), alone = self.encode_batch([f"{control}a", "a"])
        return after == alone

    def decode(self, ids: Sequence[int], after: Sequence[int] = (), *, control: bool = False) -> str:
        """Decode, with control tokens only if `control`. Give the preceding ids as `after` to keep a leading space,
        which some tokenizers drop before the first word."""
        context, own = [int(i) for i in after[-_CONTEXT:]], [int(i) for i in ids]
        before, text, alone = (
            self._backend.decode(part, skip_special_tokens=not control) for part in (context, context + own, own)
        )
        return text[len(before) :] if text.startswith(before) else alone

    def stops(self, stop_strings: Sequence[str]) -> tuple[int, ...]:
        """`stop_ids`, and the ids of those stop strings that are control tokens."""
        own = [self.control_tokens[text] for text in stop_strings if text in self.control_tokens]
        return tuple(dict.fromkeys([*self.stop_ids, *own]))

    def spells_control_token(self, text: str) -> bool:
        """Return True if a control token is spelt in `text`."""
        return bool(self._control.search(text))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the vocabulary entry of each id, or `[id]` for ids in the model's vocabulary padding."""
        return [self._backend.id_to_token(int(i)) or f"[{i}]" for i in ids]

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """True if every token id of `other` has the same meaning here; there may be more ids (for padding)."""
        return (
            self.size >= other.size
            and self.encode(_PROBE) == other.encode(_PROBE)
            and self.convert_ids_to_tokens(range(other.size)) == other.convert_ids_to_tokens(range(other.size))
        )

    def render_chat(self, messages: Objects, generation: bool, tools: Objects | None = None) -> list[int]:
        """Encode a conversation with the chat template; `generation` opens an assistant turn at the end."""
        return self.encode_batch([self.render(messages, generation, tools)])[0]

    def render(self, messages: Objects, generation: bool = False, tools: Objects | None = None) -> str:
        """Apply the chat template. Messages and tools are escaped, so only the template adds control tokens."""
        return self._render(messages, tools, add_generation_prompt=generation)[0]

    def render_with_spans(self, messages: Objects, tools: Objects | None = None) -> tuple[str, list[tuple[int, int]]]:
        """`render`, and the (start, end) characters of the {% generation %} blocks of the template."""
        return self._render(messages, tools, add_generation_prompt=False)

    def _render(self, messages: Objects, tools: Objects | None, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        assert self._template
        turns = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        text, spans = self._template.render(self._escape_all(turns), self._escape_all(tools), **options)
        if _JSON_ESCAPE in text:  # a template that limits JSON to ASCII has rewritten the mark
            found = [match.start() for match in re.finditer(f"\\{_JSON_ESCAPE}(?={self._spellings})", text)]
            shifts = [[(len(_JSON_ESCAPE) - 1) * bisect_left(found, edge) for edge in span] for span in spans]
            spans = [(begin - a, end - b) for (begin, end), (a, b) in zip(spans, shifts, strict=True)]
            text = re.sub(f"\\{_JSON_ESCAPE}(?={self._spellings})", ESCAPE, text)
        return text, spans

    def _escape_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, dict):
            return {self._escape_all(key): self._escape_all(item) for key, item in value.items()}
        return [self._escape_all(item) for item in value] if isinstance(value, list) else value

    def find_turn_end(self, text: str, start: int) -> int | None:
        """Find the first end-of-turn token in rendered `text` from `start` on and return the index after it."""
        match = re.compile(f"(?<!{ESCAPE}){re.escape(self.turn_end)}").search(text, start)
        return match.end() if match else None

    def control_spans(self, text: str, start: int = 0) -> list[Span]:
        """The characters of the control tokens in rendered `text` from `start` on."""
        return [match.span() for match in self._control.finditer(text, start)]

    def last_segment(self, text: str) -> str:
        """The last control token of rendered `text` and what follows it, which decide how text after it is encoded."""
        spans = self.control_spans(text)
        return text[spans[-1][0] :] if spans else text

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
            chat = f"an assistant turn ends with {end}{self._template}"
        lines = [
            f"bos: {bos}",
            f"eos: {name(self.eos_id)}, ends every plain text",
            f"pad: {pad}",
            f"stop tokens: {', '.join(map(name, self.stop_ids))}",
            f"chat template: {chat}",
        ]
        return (*lines, f"new tokens: {self.added}") if self.added else tuple(lines)

    def with_pad_token(self, rows: int | None = None) -> "Tokenizer":
        """A tokenizer whose files name a pad token that is in none of `end_ids`.

        Sequence classifiers of transformers read the score at the last token that is not the pad token. It is the own
        one if possible, else a reserved token, else a new token with the next id. If there is none with an id below
        `rows`, the result is this tokenizer.
        """
        if self.pad_id not in self.end_ids and self._stores_pad:
            return self
        hf = copy.deepcopy(self._hf)
        spare = [token for token, i in self.control_tokens.items() if i not in self.end_ids]
        if self.pad_id in self.end_ids:
            vocabulary = hf.get_vocab()
            new = next(token for token in ("<|pad|>", "<|padding|>", f"<|pad_{self.size}|>") if token not in vocabulary)
            hf.add_special_tokens({"pad_token": _spare_token(spare) or new})
        if rows is not None and hf.pad_token_id >= rows:
            return self
        added = self.added + len(hf) - len(self._hf)
        return Tokenizer(hf, self._source, hf.pad_token_id, self.stop_ids, added, None)

    def without_chat_template(self) -> "Tokenizer":
        """A tokenizer with the same tokens and no chat template: prompts are plain text."""
        hf = copy.deepcopy(self._hf)
        hf.chat_template = None
        return Tokenizer(hf, self._source, self.pad_id, self.stop_ids, self.added, None)

    def save(self, directory: Path | str) -> None:
        """Write the tokenizer to a folder; an unchanged one is copied byte for byte. Template arguments become
        defaults of its chat template."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._origin is not None:
            for name in FILES:
                if (self._origin / name).exists():
                    shutil.copyfile(self._origin / name, directory / name)
            if (self._origin / MORE_TEMPLATES).is_dir():
                shutil.copytree(self._origin / MORE_TEMPLATES, directory / MORE_TEMPLATES, dirs_exist_ok=True)
            return
        template = self._hf.chat_template
        try:
            self._hf.chat_template = self._template.with_defaults() if self._template else None
            self._hf.save_pretrained(directory)
        finally:
            self._hf.chat_template = template
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


def load_tokenizer(path: Path | str, source: TokenizerSource | None = None, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of the model at `path` (a folder, which needs no network, or a hub id), or of `source.path` if
    that is set. The model's generation_config.json adds stop tokens. Raises DataError that says what to set."""
    source = source or TokenizerSource()
    hf = from_pretrained(str(source.path or path), None if source.path else revision)
    original_pad, original_size = hf.pad_token, len(hf)
    template = select_chat_template(hf, source)
    changed = template != hf.chat_template or source.eos_token is not None or source.pad_token is not None
    changed |= bool(source.template_kwargs)
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
    folder = Path(source.path or path).expanduser()
    origin = folder if folder.is_dir() and not changed else None
    added = len(hf) - original_size
    return Tokenizer(
        hf, source, hf.pad_token_id, stops, added, origin, stores_pad=origin is None or original_pad is not None
    )


def _spare_token(specials: list[str]) -> str | None:
    """Find an unused token for padding; one named after padding goes before a reserved one."""
    pattern = re.compile(r"\W*(pad|finetune_right_pad_id|reserved\w*)\W*", re.IGNORECASE)
    spare = [token for token in specials if pattern.fullmatch(token)]
    return min(spare, key=lambda token: "reserved" in token.lower(), default=None)
