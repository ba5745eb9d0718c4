"""What a load test sends: one JSON file that the command line writes and Locust's processes read."""

import dataclasses
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from lvnas.errors import InputError
from lvnas.files import read_json, write_json
from lvnas_loadtest import arrivals, distributions, popularity

SLO_METRICS = ("ttft", "tpot", "e2el")


@dataclass(kw_only=True, slots=True)
class Workload:
    """Everything that decides what is sent and when; with the same `seed`, the same requests in the same
    order."""

    url: str
    """The server, `http://host:port`; a trailing `/v1` is taken off."""
    adapters: list[str]
    """Names that share the load, most popular first; each is a `model` of the server unless `routes` says
    else."""
    routes: dict[str, list[str]] = field(default_factory=dict)
    """Adapter -> [url, model] where it differs from [`url`, adapter]: another engine, or the base in its
    place."""
    rank_classes: dict[str, str] = field(default_factory=dict)
    """Adapter -> rank class (`rank 64`, `mixed <= 64`), the rows of the second table."""
    users: int = 8
    """Concurrent users of a closed loop; an open loop needs one per Locust process."""
    arrivals: str = "closed"
    """closed, poisson:RATE, gamma:RATE:CV, constant:RATE, ramp:FROM:TO or trace:FILE (requests/s)."""
    popularity: str = "uniform"
    """uniform, zipf:ALPHA, distinct, identical, trace or weights:A=3,B=1."""
    duration: float = 30.0
    """Seconds in which requests are sent, warm-up not counted."""
    warmup: float = 0.0
    """Seconds before that whose requests are sent and not counted."""
    requests: int | None = None
    """Send exactly this many instead of filling `duration` (then no warm-up); for comparisons with other
    tools."""
    prompt_tokens: str = "32"
    """Length of the text of a prompt, about this many tokens: 64, uniform:16:128, normal:64:8,
    lognormal:64:0.5."""
    output_tokens: str = "32"
    """Length of the answers, exact where the server knows `ignore_eos`."""
    ignore_eos: bool = True
    """Ask for exactly `output_tokens` (a vLLM extension); else it is only the upper limit."""
    image_share: float = 0.5
    """Share of requests with an image; the rest are text only."""
    image_size: str = "64"
    """Side of the square images in pixels, any of the forms of lengths."""
    image_pool: int = 16
    """How many different images there are; each is encoded once, before the load."""
    slo: dict[str, float] = field(default_factory=dict)
    """Goodput's limits in ms: ttft, tpot, e2el."""
    slots: int | None = None
    """Adapters that fit on the device at once (the server's --max-loras); tags requests cold or warm."""
    churn: float = 0.0
    """Seconds between two adapters unloaded and loaded again during the load (vLLM's runtime endpoints); 0
    is off."""
    adapter_paths: dict[str, str] = field(default_factory=dict)
    """Adapter -> folder on the server, which churn loads it from."""
    canary_every: float = 0.0
    """Seconds between two canary questions during the load; 0 is off."""
    timeout: float = 120.0
    """Seconds after which a request has failed."""
    server_pids: list[int] = field(default_factory=list)
    """Processes whose memory to follow; found by the port where the server is local and none is given."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.url = normal_url(self.url)
        problems = [problem for problem in self._problems() if problem]
        if problems:
            raise InputError("; ".join(problems))
        if not self.rank_classes:
            self.rank_classes = {}

    def _problems(self) -> list[str | None]:
        return [
            _problem(arrivals.form, self.arrivals),
            _problem(popularity.popularity, self.popularity, self.adapters),
            _problem(distributions.distribution, "prompt length", self.prompt_tokens),
            _problem(distributions.distribution, "output length", self.output_tokens),
            _problem(distributions.distribution, "image size", self.image_size),
            None if self.users >= 1 else f"users {self.users} must be at least 1",
            None
            if self.requests is None or self.requests >= 1
            else f"requests {self.requests} must be at least 1",
            None if self.duration > 0 else f"duration {self.duration:g} s must be above 0",
            None if self.timeout > 0 else f"timeout {self.timeout:g} s must be above 0",
            None if self.warmup >= 0 else f"warm-up {self.warmup:g} s must be 0 or more",
            None
            if self.requests is None or not self.warmup
            else "requests and warm-up exclude each other; drop one",
            None if 0 <= self.image_share <= 1 else f"image share {self.image_share:g} must be from 0 to 1",
            None if self.image_pool >= 1 else f"image pool {self.image_pool} must be at least 1",
            *(
                None
                if name in SLO_METRICS
                else f"SLO {name}:{limit:g} must be one of {', '.join(SLO_METRICS)}"
                for name, limit in self.slo.items()
            ),
            *(
                None if limit > 0 else f"SLO {name}:{limit:g} must be above 0 ms"
                for name, limit in self.slo.items()
            ),
        ]

    @property
    def open_loop(self) -> bool:
        return self.arrivals != "closed"

    def route(self, adapter: str) -> tuple[str, str]:
        """The (url, model) that serves `adapter`."""
        url, model = self.routes.get(adapter, (self.url, adapter))
        return normal_url(url), model

    def write(self, path: Path) -> None:
        """Writes it as JSON, atomically."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Workload":
        """The workload in a JSON file.

        Raises:
            InputError: not JSON, an unknown or missing field, a value out of range.
        """
        value = read_json(path)
        names = {entry.name for entry in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) - names or not {"url", "adapters"} <= set(value):
            extra = sorted(set(value) - names) if isinstance(value, dict) else []
            raise InputError(f"not a workload: {path} (unknown fields: {extra}; needs url and adapters)")
        return cls(**value)


def normal_url(url: str) -> str:
    """`http://host:port` of what a user typed.

    Raises:
        InputError: no http or https address.
    """
    text = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    parts = urllib.parse.urlsplit(text)
    try:
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"server address {url!r} is not like http://127.0.0.1:8000")
    return text


def _problem(check, *arguments) -> str | None:  # type: ignore[no-untyped-def]
    try:
        check(*arguments)
    except InputError as error:
        return str(error)
    return None
