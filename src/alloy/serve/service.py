"""What all routes share: the model, the engine thread, metrics, and one way to run requests."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alloy.engine.request import Completion, Output, Request, Timings
from alloy.serve.answer import Choice, Delta, Layout, Tally
from alloy.serve.driver import Driver, Ticket
from alloy.serve.errors import ApiError
from alloy.serve.metrics import Metrics
from alloy.serve.model import ServedModel
from alloy.serve.settings import ServerSettings


class Step(NamedTuple):
    """News of one sample."""

    choice: Choice
    completion: Completion
    delta: Delta
    output: Output


@dataclass(frozen=True)
class Service:
    """One served model."""

    model: ServedModel
    driver: Driver
    metrics: Metrics
    settings: ServerSettings

    def run(self, requests: Sequence[Request], layout: Layout) -> "Run":
        """Submit requests; ApiError if they are not admitted."""
        return Run(self, self.driver.submit(requests), layout)


class Run:
    """Submitted requests and what has come of them."""

    def __init__(self, service: Service, ticket: Ticket, layout: Layout) -> None:
        self.ticket = ticket
        self.tally = Tally(ticket)
        self._service = service
        self._layout = layout
        # place of each request among those asked for
        self._places = {request_id: i for i, request_id in enumerate(ticket.requests)}
        self._samples = max(r.params.n for r in ticket.requests.values())

    @property
    def choices(self) -> list[Choice]:
        """All choices so far, by index."""
        return sorted(self.tally.choices.values(), key=lambda c: c.index)

    async def steps(self) -> AsyncGenerator[Step]:
        """News as they come, until all is said."""
        timings = Timings()
        try:
            async for output in self.ticket:
                self.tally.note(output)
                for completion in output.completions:
                    key = (output.id, completion.index)
                    if key not in self.tally.choices:
                        index = self._places[output.id] * self._samples + completion.index
                        self.tally.choices[key] = Choice(index, self._layout)
                    choice = self.tally.choices[key]
                    timings = completion.timings
                    yield Step(choice, completion, choice.feed(completion), output)
        except ApiError as error:
            if error.code == "model_error":
                self._service.metrics.failed()
            self.cancel()
            raise
        reasons = [c.finish_reason or "stop" for c in self.choices]
        tally = self.tally
        self._service.metrics.answered(self.ticket, reasons, tally.completion_tokens, tally.reasoning_tokens, timings)

    async def finish(self) -> None:
        """Read to the end."""
        async for _ in self.steps():
            pass

    def cancel(self) -> None:
        """Give back what the engine holds for it; nothing happens to one that is done."""
        self._service.driver.cancel(self.ticket)
