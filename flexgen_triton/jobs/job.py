"""A batch job: the lines of an input, read, checked, run and answered.

Owns the way of a line. The format is `format`'s and `answers`', the output file `journal`'s, the generation the
library's; prints nothing and reads no flag, so that a server may use it as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from ..llm import LLM
from ..models.config import ModelError
from ..plan.policy import Policy
from ..run.totals import Totals
from ..sequences.outputs import RequestOutput
from ..sequences.translator import PreparedPrompt
from . import answers as batch_answers
from . import format as batch_format
from .answers import AnswerError
from .fields import LineError
from .format import ChatRequest, CompletionRequest, SeenIds
from .journal import MAX_LINE, Answers, Line, read_lines

Check = Callable[[], None]

SAMPLES, SAMPLE = 16, 1 << 16  # of each of a model's files: pieces that are hashed, and their bytes
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "config.json", "generation_config.json",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model",
    "chat_template*",
)  # fmt: skip


@dataclass(slots=True)
class _Pending:
    """A line whose prompts are under way: what is needed to write its answer."""

    line: Line  # without its bytes
    custom_id: str
    request: CompletionRequest | ChatRequest
    outputs: list[RequestOutput | None]
    missing: int


class Job:
    """Runs the lines of an input that have no answers yet. `check` is called at every line, and may end the job."""

    def __init__(self, llm: LLM, answers: Answers, seed: int, check: Check) -> None:
        self._llm, self._answers, self._seed, self._check = llm, answers, seed, check
        self._seen = SeenIds()
        self._pending: dict[int, tuple[_Pending, int]] = {}  # by a prompt's number: its line, its place there
        self._num_prompts = 0
        self.failed = 0

    def run(self, file: BinaryIO, progress: Callable[[], None]) -> None:
        """Answer every line that is left, telling `progress` now and then. Raises what model and answers do."""
        with closing(self._llm.stream(self._prompts(file))) as outputs:
            for n, output in enumerate(outputs):
                if n == 0:
                    self._answers.confirm(formats(self._llm.policy))
                self._take(output)
                progress()
        assert not self._pending, sorted(self._pending)

    @property
    def totals(self) -> Totals:
        """Sums over the run so far."""
        return self._llm.totals

    def _prompts(self, file: BinaryIO) -> Iterator[PreparedPrompt]:
        """The prompts of the lines that are left, in order; lines that cannot be run are answered on the way."""
        for line in read_lines(file):
            self._check()
            is_done = self._answers.is_done(line)
            if not line.is_blank:
                yield from self._line_prompts(line, is_done=is_done)

    def _line_prompts(self, line: Line, *, is_done: bool) -> Sequence[PreparedPrompt]:
        """A line's prompts, noted as pending. One that is done is read for its custom_id, which others may repeat."""
        custom_id = None
        try:
            fields = batch_format.read_object(_bytes(line))
            custom_id = batch_format.read_custom_id(fields)
            first = self._seen.add(custom_id, line.number)
            if is_done:
                return ()
            if first is not None:
                raise LineError(f"line {first} has the same custom_id; each line needs its own", "duplicate_custom_id")
            request = batch_format.read_request(fields)
            prompts = self._prepare(request, line.number)
        except LineError as error:
            if not is_done:
                self._fail(line, custom_id, error.code, str(error))
            return ()
        pending = _Pending(replace(line, raw=None), custom_id, request, [None] * len(prompts), len(prompts))
        for place in range(len(prompts)):
            self._pending[self._num_prompts] = pending, place
            self._num_prompts += 1
        return prompts

    def _prepare(self, request: CompletionRequest | ChatRequest, line: int) -> list[PreparedPrompt]:
        """The request's prompts, each with a seed that no interruption changes. Raises LineError."""
        if isinstance(request, ChatRequest):
            prompts: Sequence[str | Sequence[int]] = [self._render(request)]
        else:
            prompts = request.prompts
        prepared = []
        for n, prompt in enumerate(prompts):
            params = request.params
            if isinstance(request, ChatRequest) and request.fills:
                room = self._llm.spec.max_positions - len(prompt)
                params = replace(params, max_tokens=max(room, params.max_tokens))
            if params.seed is None:
                key = f"{self._seed} {line} {n}".encode()
                params = replace(params, seed=xxhash.xxh3_64_intdigest(key))
            try:
                prepared.append(self._llm.request(prompt, params))
            except ValueError as error:
                raise LineError(f"prompt {n}: {error}" if len(prompts) > 1 else str(error)) from error
        return prepared

    def _render(self, request: ChatRequest) -> list[int]:
        """The conversation's token ids, by the model's own template."""
        from jinja2 import TemplateError

        try:
            tokenizer = self._llm.tokenizer
        except ValueError as error:
            raise LineError(str(error)) from error
        if tokenizer.chat_template is None:
            raise LineError(
                f"{self._llm.spec.name} has no chat template; ask {batch_format.COMPLETIONS}", "unsupported_url"
            )
        try:
            ids = tokenizer.apply_chat_template(
                list(request.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (
            TemplateError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise LineError(f"{self._llm.spec.name}'s chat template refuses the messages: {error}") from error
        return list(cast(list[int], ids))

    def _take(self, output: RequestOutput) -> None:
        """Note a prompt's answer, and write the line's when it was the last one."""
        pending, place = self._pending.pop(output.request_id)
        pending.outputs[place] = output
        pending.missing -= 1
        outputs = [o for o in pending.outputs if o is not None]
        if pending.missing:
            return
        failed = next((o for o in outputs if o.error), None)
        if failed is not None:
            self._fail(pending.line, pending.custom_id, str(failed.error_code), str(failed.error))
            return
        try:
            body = self._body(pending.request, outputs, pending.line.tag)
        except AnswerError as wrong:
            self._fail(pending.line, pending.custom_id, "no_number", str(wrong))
            return
        request_id = f"req_{pending.line.tag}"
        self._answers.append(pending.line, batch_answers.answer(pending.custom_id, request_id, body))

    def _body(
        self, request: CompletionRequest | ChatRequest, outputs: Sequence[RequestOutput], tag: str
    ) -> dict[str, Any]:
        created, model = int(time.time()), self._llm.spec.name
        if isinstance(request, ChatRequest):
            (output,) = outputs
            return batch_answers.chat_body(
                request, output, request_id=tag, created=created, model=model, text=self._text
            )
        return batch_answers.completion_body(
            request, outputs, request_id=tag, created=created, model=model, text=self._text
        )

    def _text(self, ids: Sequence[int], *, special: bool) -> str:
        if not self._llm.has_tokenizer:
            return "".join(f"token_id:{t}" for t in ids)
        decoded = self._llm.tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _fail(self, line: Line, custom_id: str | None, code: str, message: str) -> None:
        self._answers.append(line, batch_answers.failure(custom_id, line.number, code, message))
        self.failed += 1


def _bytes(line: Line) -> bytes:
    if line.raw is None:
        raise LineError(f"the line has {line.size} bytes; at most {MAX_LINE} are read", "line_too_long")
    return line.raw


def formats(policy: Policy) -> dict[str, Any]:
    """Policy fields that change the output."""
    return {
        "weights": policy.weight_format.description if policy.weight_format else "uncompressed",
        "cache": policy.cache_format.description,
        "attn_sparsity": policy.attn_sparsity,
    }


def files_digest(directory: Path) -> str:
    """A digest of a model's files, wherever they lie: of each its name, its size, and its bytes or samples of them."""
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern)}):
        if not path.is_file():
            raise ModelError(f"{path} is no ordinary file; download it again")
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        step = max((size - SAMPLE) // (SAMPLES - 1), SAMPLE)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def survey(file: BinaryIO, answers: Answers, check: Check) -> tuple[int, int]:
    """Lines to answer in all, and lines that are left. Raises JournalError where the done ones are not the input's."""
    total = left = number = 0
    for line in read_lines(file):
        check()
        number = line.number
        is_done = answers.is_done(line)
        if not line.is_blank:
            total += 1
            left += not is_done
    answers.check_end(number)
    return total, left
