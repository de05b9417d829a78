"""Texts held to a JSON schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
from copy import copy
from typing import Any

import numpy as np

from mlx_rsgwm.serving.errors import RequestError

# Between its parts a text has no white space: a model could go on with that for ever.
COMPACT: Any = {"whitespace_flexible": False}


class Grammar:
    """What a row may write, and how far it is."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, (vocabulary,) bool; tokens that end a text once it is whole.

        Raises:
            RequestError: the grammar takes more work than it may.
        """
        mask = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        return mask[: self._vocabulary].astype(bool)

    def take(self, token: int) -> bool:
        """The token that was written; False once nothing can follow.

        Raises:
            RequestError: as :meth:`allowed`.
        """
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"response_format: {self._matcher.get_error()}", code="invalid_value", param="response_format"
            )


class Grammars:
    """Makes grammars for the texts of one tokenizer; it is taken apart once, at the first."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._made: dict[frozenset[int], Any] = {}

    def of(self, schema: str, end_ids: frozenset[int]) -> Grammar:
        """A grammar of the values that a JSON schema allows, for texts that ``end_ids`` end.

        Raises:
            RequestError: it is no schema, has parts that cannot be held to, or the tokenizer cannot be taken apart.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.loads(schema), overrides=COMPACT)
            tokens = self._tokens(end_ids)
        except ValueError as error:
            raise RequestError(f"response_format: {error}", code="invalid_value", param="response_format") from None
        problem = LLMatcher.validate_grammar(grammar, tokens)
        if problem:
            first = problem.splitlines()[0]
            raise RequestError(f"response_format: {first}", code="invalid_value", param="response_format")
        return Grammar(LLMatcher(tokens, grammar), self._vocabulary)

    def _tokens(self, end_ids: frozenset[int]) -> Any:
        from llguidance import LLTokenizer

        if end_ids not in self._made:
            backend = copy(getattr(self._tokenizer, "backend_tokenizer", None))
            if backend is None:
                raise ValueError("the base's tokenizer is not one that texts can be held to a schema with")
            backend.no_padding()
            backend.no_truncation()
            self._made[end_ids] = LLTokenizer(backend.to_str(), self._vocabulary, sorted(end_ids))
        return self._made[end_ids]
