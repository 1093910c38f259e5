"""What a person sees: one logger, a panel at the start, one live line while training, plain lines where no one watches.

Everything goes to standard error, so that standard output stays free for results, and to log.txt without colour.
"""

import functools
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_ROOT = "alloy"
_TO_FILE_ONLY = {"file_only": True}


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `log = get_logger(__name__)`."""
    return logging.getLogger(name if name.split(".")[0] == _ROOT else f"{_ROOT}.{name}")


def setup(console: bool = True, file: Path | None = None) -> None:
    """Send the log to the console (`console` False: warnings only) and, in addition, to `file`.

    May be called again, for example once the run directory is known; earlier handlers are replaced.
    """
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    screen = _ConsoleHandler()
    screen.setLevel(logging.INFO if console else logging.WARNING)
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    root.addHandler(screen)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = logging.FileHandler(file, encoding="utf-8")
        writer.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(writer)


@functools.cache
def console() -> "Console":
    """The one rich console, on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    """Prints above the live line on a terminal, plainly otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if not console().is_terminal:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
            return
        style = "yellow" if record.levelno >= logging.WARNING else None
        console().print(text, style=style, markup=False)


def start_panel(title: str, rows: Mapping[str, object]) -> None:
    """What is about to run: a panel on a terminal, aligned plain lines otherwise and in log.txt."""
    log = get_logger(_ROOT)
    width = max((len(name) for name in rows), default=0)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
    is_live = console().is_terminal and log.isEnabledFor(logging.INFO)
    if is_live and not _is_quiet():
        from rich.panel import Panel
        from rich.text import Text

        console().print(Panel(Text("\n".join(lines)), title=title, title_align="left", expand=False))
    extra = _TO_FILE_ONLY if is_live else None
    log.info("%s\n%s", title, "\n".join(f"  {line}" for line in lines), extra=extra)


def progress_text(
    step: int,
    steps: int | None = None,
    *,
    loss: float | None = None,
    lr: float | None = None,
    tokens_per_s: float | None = None,
    mfu_frac: float | None = None,
    grad: float | None = None,
    memory_bytes: float | None = None,
    eta_s: float | None = None,
) -> str:
    """`step 1,240/5,000  loss 2.913  lr 2.8e-3  412k tok/s  MFU 41%  grad 0.83  mem 61.2 GiB  eta 1h 12m`;
    what is None is left out."""
    parts = [f"step {step:,}" + (f"/{steps:,}" if steps else "")]
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if lr is not None:
        parts.append(f"lr {short_exponent(lr)}")
    if tokens_per_s is not None:
        parts.append(f"{short_count(tokens_per_s)} tok/s")
    if mfu_frac is not None:
        parts.append(f"MFU {mfu_frac:.0%}")
    if grad is not None:
        parts.append(f"grad {grad:.2f}")
    if memory_bytes is not None:
        parts.append(f"mem {memory_bytes / 2**30:.1f} GiB")
    if eta_s is not None:
        parts.append(f"eta {short_time(eta_s)}")
    return "  ".join(parts)


def short_exponent(value: float) -> str:
    """0.0028 -> 2.8e-3."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def short_count(value: float) -> str:
    """412345 -> 412k, 1234567 -> 1.23M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.6k would print as 1000k: go by the rounded figure
        if float(f"{value:.3g}") >= limit:
            scaled = value / limit
            return f"{scaled:.0f}{suffix}" if scaled >= 99.95 else f"{scaled:.3g}{suffix}"
    return f"{value:.3g}"


def short_time(seconds: float) -> str:
    """4325 -> 1h 12m; under an hour with seconds."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


class ProgressLine:
    """One live line on a terminal; otherwise one plain line every `every` steps. Both end up in log.txt every `every` steps."""

    def __init__(self, steps: int | None, every: int = 10, enabled: bool = True) -> None:
        self.steps = steps
        self.every = every
        self.enabled = enabled
        self._live: Live | None = None
        self._log = get_logger(_ROOT)

    def __enter__(self) -> Self:
        if self.enabled and console().is_terminal:
            from rich.live import Live

            self._live = Live(console=console(), refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        lr: float | None = None,
        tokens_per_s: float | None = None,
        mfu_frac: float | None = None,
        grad: float | None = None,
        memory_bytes: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Show the state after `step`."""
        is_due = step % self.every == 0 or step == self.steps
        if not self.enabled or not (is_due or self._live):
            return
        text = progress_text(
            step, self.steps, loss=loss, lr=lr, tokens_per_s=tokens_per_s, mfu_frac=mfu_frac, grad=grad,
            memory_bytes=memory_bytes, eta_s=eta_s,
        )  # fmt: skip
        if self._live:
            from rich.text import Text

            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        if is_due:
            self._log.info("%s", text, extra=_TO_FILE_ONLY if self._live else None)

    def note(self, text: str) -> None:
        """A line that stays, such as a validation result."""
        if self.enabled:
            self._log.info("%s", text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()
            self._live = None


def _is_quiet() -> bool:
    handlers = logging.getLogger(_ROOT).handlers
    return not any(isinstance(handler, _ConsoleHandler) and handler.level <= logging.INFO for handler in handlers)
