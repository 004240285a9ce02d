"""From prompts to sequences of tokens, and from those to outputs: all that is asked of a model's own tokenizer.

Knows how many tokens and positions the model has. Does not know how sequences are generated.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ..models.config import ModelError
from ..plan.policy import PolicyError
from ..plan.spec import ModelSpec
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .params import SamplingParams
from .prompts import Prompt, as_prompt
from .sampler import Logprobs
from .sequence import TokenSequence
from .text import TextStream
from .tokenizer import check_files, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .tokenizer import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt that can be run: its text where it was one, its token ids, and how it is to be completed."""

    prompt: str | None
    token_ids: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One prompt's sequences while they are under way, and the text of those whose text is watched as it grows."""

    number: int
    prepared: PreparedPrompt
    sequences: list[TokenSequence]
    texts: list[TextStream | None]
    arrival_time: float

    @property
    def finished(self) -> bool:
        return all(s.finished for s in self.sequences)


class Translator:
    """Turns prompts into sequences for a model, and the sequences into outputs.

    `directory` is the model's, None where its weights are random; prompts without a seed get theirs from `seed`.
    Raises ModelError at once for a file of the tokenizer that is no JSON, or of another structure.
    """

    def __init__(self, spec: ModelSpec, directory: Path | None, *, seed: int) -> None:
        self._spec, self._directory, self._seed = spec, directory, seed
        self._drawn = 0  # seeds given to prompts without one
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.has_tokenizer = has_tokenizer(directory)
        if self.has_tokenizer and directory:
            check_files(directory)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, loaded on first use; raises ModelError where there is none that works."""
        if self._tokenizer is None:
            if self._directory is None:
                raise ModelError(f"{self._spec.name} has random weights and no tokenizer; give prompts as token ids")
            self._tokenizer = load_tokenizer(self._directory)
        return self._tokenizer

    def token_ids(self, prompt: Prompt, name: str = "the prompt") -> list[int]:
        """A prompt's token ids, by the model's own tokenizer where it is text.

        Raises PromptError (a ValueError), which calls it by `name`, for what is no prompt.
        """
        prompt = as_prompt(prompt, name)
        if not isinstance(prompt, str):
            return list(prompt)
        return list(self.tokenizer(prompt, verbose=False)["input_ids"])  # length is checked here, not warned of

    def prepare(self, prompt: Prompt, params: SamplingParams, name: str) -> PreparedPrompt:
        """Check that a prompt, which errors call by `name`, can be run, and turn it into token ids.

        Raises ValueError where it cannot, PolicyError (one too) where the model has too few positions.
        """
        if self.has_tokenizer:
            _ = self.tokenizer  # what is wrong with it must not be found out when the answer is made into text
        ids = self.token_ids(prompt, name)
        if not ids:
            raise ValueError(f"{name} is empty; give it at least one token")
        bad = next((t for t in ids if not 0 <= t < self._spec.vocab), None)
        if bad is not None:
            raise ValueError(f"{name} has token id {bad}; the vocabulary has {self._spec.vocab}")
        bad = next((t for t in params.stop_token_ids if t >= self._spec.vocab), None)
        if bad is not None:
            raise ValueError(f"stop_token_ids holds {bad}, which never comes; the vocabulary has {self._spec.vocab}")
        room = self._spec.max_positions - len(ids)
        if params.max_tokens > room:
            raise PolicyError(
                f"{name} has {len(ids)} tokens and asks for {params.max_tokens} more; "
                f"{self._spec.name} has {self._spec.max_positions} positions, so at most {max(room, 0)} fit"
            )
        if params.stop and not self.has_tokenizer:
            raise ValueError(f"stop strings need a tokenizer and {self._spec.name} has none; give stop_token_ids")
        return PreparedPrompt(prompt if isinstance(prompt, str) else None, array("i", ids), params)

    def answer(self, number: int, prepared: PreparedPrompt, eos: Collection[int], *, partial: bool = False) -> Answer:
        """The sequences of one prompt, each with a seed and, where text must be watched as it grows, its text.

        `eos` are the token ids that end a text; `partial` says that it is asked for before it has ended.
        """
        params = prepared.params
        seed = params.seed
        if seed is None:
            self._drawn += 1
            seed = xxhash.xxh3_64_intdigest(f"{self._seed} {self._drawn}".encode())
        sequences, texts = [], []
        for n in range(params.n):
            watched = params.stop or (partial and self.has_tokenizer)
            text = TextStream(self._decoder(params), params.stop, params.min_tokens) if watched else None
            once = params if n == 0 else replace(params, prompt_logprobs=None)  # the prompt is the same
            watch = text.add if text else None
            sequences.append(TokenSequence(prepared.token_ids, once, seed + n, eos, watch))
            texts.append(text)
        return Answer(number, prepared, sequences, texts, time.time())

    def _decoder(self, params: SamplingParams) -> Callable[[Sequence[int]], str]:
        tokenizer, skip = self.tokenizer, params.skip_special_tokens
        return lambda ids: str(
            tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        )

    def output(self, answer: Answer) -> RequestOutput:
        """The output of a prompt's sequences as they are, ended or not."""
        sequences, prepared = answer.sequences, answer.prepared
        failed = next((s for s in sequences if s.error), None)
        outputs = [self._completion(n, s, t) for n, (s, t) in enumerate(zip(sequences, answer.texts, strict=True))]
        first = sequences[0]
        scored = None
        if prepared.params.prompt_logprobs is not None and failed is None:
            scored = [None, *(self._named(p) for p in first.prompt_logprobs)]
        return RequestOutput(
            answer.number,
            prepared.prompt,
            list(prepared.token_ids),
            [] if failed else outputs,
            scored,
            RequestMetrics(
                answer.arrival_time,
                _earliest(s.first_scheduled_time for s in sequences),
                _earliest(s.first_token_time for s in sequences),
                max(s.finished_time or 0.0 for s in sequences) if answer.finished else None,
            ),
            failed.error if failed else None,
            failed.error_code if failed else None,
        )

    def _completion(self, index: int, sequence: TokenSequence, text: TextStream | None) -> CompletionOutput:
        logprobs = None
        if sequence.params.logprobs is not None:
            logprobs = [self._named(p) for p in sequence.logprobs]
        return CompletionOutput(
            index,
            self._text(sequence, text),
            list(sequence.tokens),
            sequence.finish_reason,
            sequence.stop_reason,
            sum(p[t].logprob for p, t in zip(logprobs, sequence.tokens, strict=True)) if logprobs else None,
            logprobs,
        )

    def _text(self, sequence: TokenSequence, text: TextStream | None) -> str:
        """The completion as text, without what ended it unless that was asked for."""
        if not self.has_tokenizer:
            return ""
        params, tokens = sequence.params, sequence.tokens
        keep = params.include_stop_str_in_output
        if text is not None and not sequence.finished:
            return text.text
        if text is not None and text.stopped_at is not None and isinstance(sequence.stop_reason, str):
            return text.text[: text.stopped_at + (len(sequence.stop_reason) if keep else 0)]
        if sequence.finish_reason == "stop" and not keep:
            tokens = tokens[:-1]
        return self._decoder(params)(tokens)

    def _named(self, logprobs: Logprobs) -> Logprobs:
        """Add the text of every token, where there is a tokenizer."""
        if not self.has_tokenizer:
            return logprobs
        return {t: replace(p, decoded_token=str(self.tokenizer.decode([t]))) for t, p in logprobs.items()}


def _earliest(times: Iterable[float | None]) -> float | None:
    return min((t for t in times if t is not None), default=None)
