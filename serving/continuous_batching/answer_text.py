"""The text of one answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from serving.continuous_batching.detokenizer import MAX_CONTEXT, Detokenizer, StopStrings
from serving.continuous_batching.sampling import SamplingParams
from serving.continuous_batching.text_sequence import FinishReason


class AnswerText:
    """Token ids to text, which ends before a stop string.

    prompt_ids: (prompt,). special_tokens: the text of each by its id. A stop string may have them also where
    the text has not. num_tokens: tokens so far. finish_reason: set at the end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        prompt_ids: torch.Tensor,
        special_tokens: dict[int, str],
    ) -> None:
        skip = params.skip_special_tokens
        self._detokenizer = Detokenizer(
            lambda ids: tokenizer.decode(ids, skip_special_tokens=skip), prompt_ids[-MAX_CONTEXT:].tolist()
        )
        self._stop_strings, self._params = StopStrings(params.stop), params
        self._hidden = {
            token_id: token
            for token_id, token in (special_tokens.items() if skip and params.stop else ())
            if any(token in stop for stop in params.stop)
        }
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def feed(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> str:
        """The new text. finish_reason: why the sequence ends with these tokens, if no stop string is in them.

        A stop string is looked for after each token, so that the answer ends at the one it ends in.
        """
        text = ""
        groups = [[token_id] for token_id in token_ids] if self._params.stop else [token_ids]
        for number, group in enumerate(groups, 1):
            self.num_tokens += len(group)
            reason = finish_reason if number == len(groups) else None
            shown = group[:-1] if reason == "stop" else group  # without the end token
            new = self._detokenizer.feed(shown, last=reason is not None)
            stopped = False
            if self.num_tokens > self._params.min_tokens:
                new, stopped = self._stop_strings.feed(new)
                if not stopped and shown and shown[-1] in self._hidden:
                    more, stopped = self._stop_strings.feed(self._hidden[shown[-1]], hidden=True)
                    new += more
            text += new
            if stopped:
                self.finish_reason = "stop"
                return text
        self.finish_reason = finish_reason
        return text + self._stop_strings.rest() if finish_reason else text
