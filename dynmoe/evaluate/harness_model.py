"""Adapts our models to lm-evaluation-harness. Shape suffix L: MoE layers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dynmoe.data.tokenizer import Tokenizer
from dynmoe.errors import UserError
from dynmoe.evaluate.models import WholeModel
from dynmoe.evaluate.scoring import ExpertUse, Passage, Progress, Score, rows_of_pass
from dynmoe.generate import continue_tokens
from dynmoe.model.sampling import Sampling

Scorer = Callable[[Sequence[Passage], ExpertUse], list[Score]]


class HarnessModel(TemplateLM):
    """A model with the harness's interface and the conventions of its own Hugging Face models.

    Nothing is prepended to a context, except that an empty one becomes the end-of-document token. Requests longer than
    a training sequence are truncated at the beginning, and counted in ``cut`` by task.

    Args:
        longest: tokens of a training sequence.
        scorer: scores passages and counts their experts.
        model: model that generates text; None: in a rehearsal, all texts are empty.
        progress: called while text is generated.

    Attributes:
        use: experts of each task's tokens, in contexts and continuations, counted each time they are computed.
        cut: number of truncated requests of each task.
    """

    def __init__(
        self, tokenizer: Tokenizer, longest: int, scorer: Scorer, model: WholeModel | None, progress: Progress
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._longest = longest
        self._progress = progress
        self._scorer = scorer
        self._writer = model
        self._tasks: list[str] = []
        self.use = ExpertUse()
        self.cut: dict[str, int] = {}

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would generate it."""
        self._tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        passages = [
            self._passage(task, context, continuation, text[1])
            for task, (text, context, continuation) in zip(self._tasks, requests, strict=True)
        ]
        return [(own.log_prob, own.greedy) for own in self._scorer(passages, self.use)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text, in windows of the training length, scoring each token once."""
        passages: list[Passage] = []
        ends = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self._longest, 1)
            passages += [
                Passage([*context, *scored], len(scored), request.task_name)
                for context, scored in map(make_disjoint_window, windows)
            ]
            ends.append(len(passages))
        scores = self._scorer(passages, self.use)
        starts = [0, *ends[:-1]]
        return [sum(own.log_prob for own in scores[a:b]) for a, b in zip(starts, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generates text after each context, up to a stop sequence, the end of the document, or its token limit."""
        for request in requests:
            self._check_length(request)
        if self._writer is None:
            return [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        rows = rows_of_pass(self._writer, self._longest)
        written = dict[int, str]()
        for numbers in alike.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), rows):
                own = numbers[start : start + rows]
                texts = self._write(self._writer, [requests[number] for number in own], seed=start)
                written |= zip(own, texts, strict=True)
                self._progress(len(written), len(requests))
        return [written[number] for number in range(len(requests))]

    def _write(self, model: WholeModel, requests: Sequence[Instance], seed: int) -> list[str]:
        """Continues the contexts of requests with the same settings as one batch."""
        settings = normalize_gen_kwargs(requests[0].args[1])
        num_tokens = settings["max_gen_toks"]
        stops = settings["until"]
        sampling = Sampling(
            settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            top_k=int(settings.get("top_k", 0)), top_p=float(settings.get("top_p", 1.0)),
        )  # fmt: skip
        room = self._longest - num_tokens
        prompts = [
            self._cut(request.task_name, self.tok_encode(request.args[0]) or [self.eot_token_id], room)
            for request in requests
        ]
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        computed = [len(prompt) for prompt in prompts]  # tokens of each row in the next forward pass; 0: finished
        for step in continue_tokens(model.trained, prompts, num_tokens, sampling, seed):
            for row, token in enumerate(step.tokens):
                if computed[row] == 0:
                    continue
                experts_LS = step.experts_LBS[:, row, -computed[row] :]
                self.use.add(requests[row].task_name, experts_LS.numel(), int(experts_LS.sum()))
                written[row] += [] if token is None else [token]
                texts[row] = self._tokenizer.decode(written[row])
                computed[row] = int(token is not None and not any(stop and stop in texts[row] for stop in stops))
            if not any(computed):
                break
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _check_length(self, request: Instance) -> None:
        num_tokens = normalize_gen_kwargs(request.args[1])["max_gen_toks"]
        if num_tokens >= self._longest:
            problem = f"generates up to {num_tokens} tokens, but data.sequence_length is {self._longest}"
            cure = "name a copy of its YAML file with a smaller generation_kwargs.max_gen_toks"
            raise UserError(f"task {request.task_name}: {problem}; {cure}")

    def _passage(self, task: str, context: list[int], continuation: list[int], text: str) -> Passage:
        if not continuation:
            raise UserError(f"task {task}: the continuation {text!r} has no token of its own; start it with a space")
        if len(continuation) > self._longest:
            problem = f"a continuation has {len(continuation)} tokens, but data.sequence_length is {self._longest}"
            raise UserError(f"task {task}: {problem}; remove the task")
        return Passage(self._cut(task, [*context, *continuation], self._longest + 1), len(continuation), task)

    def _cut(self, task: str, tokens: list[int], most: int) -> list[int]:
        """Returns the last ``most`` tokens."""
        if len(tokens) > most:
            self.cut[task] = self.cut.get(task, 0) + 1
        return tokens[-most:]
