"""A reranking server with the `/v1/rerank` interface that Jina, Cohere and vLLM share.

    mmr5 serve --model i2vec/MM-R5 --images pages/

    curl http://127.0.0.1:8787/v1/rerank -H 'Content-Type: application/json' \\
        -d '{"query": "What was the revenue?", "documents": [{"image": "p1.png"}, {"image": "p2.png"}], "top_n": 1}'

A request's fields:

- query: a string, or {"text": …}
- documents: pages, each {"text": …} (or a string), {"image": …} or, as in vLLM, {"content": [{"type": "image_url",
  "image_url": {"url": …}}]}. An image is a data: URL, base64, a path inside the folder that the server was started
  with, or an http(s) URL where it allows them
- top_n: results at most (0: all); return_documents: repeat the documents; return_reasoning: add what the model wrote
- model: may be left out; another name than the server's is refused

The answer has `results`, best first, each with `index` and `relevance_score`: in mode "score" the probability that the
page stands first, among these pages; in "pointwise" that it is relevant; a written answer has no scores, and the score
is 1/rank.

Requests that wait are ranked together. A broken one costs the others nothing. Errors are JSON: {"error": {"message",
"type"}}.
"""

import asyncio
import base64
import binascii
import hmac
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mmr5_lab.reranking.pages import Pair, TextPage, name_pair
from mmr5_lab.reranking.ranking import Ranker, Ranking, RemoteError, relevance
from mmr5_lab.reranking.whole_runs import LONGEST_TEXT

logger = logging.getLogger(__name__)
KEY = "MMR5_SERVE_KEY"  # environment variable: the key that clients must send
LEFT = 0.5  # seconds between looks whether a client has hung up


class RefusedError(Exception):
    """A request that is answered with an error: its HTTP status and message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """documents and bytes of a request; waiting: requests in the queue; seconds: until a request is given up"""

    documents: int = 100
    bytes: int = 64 << 20
    waiting: int = 64
    seconds: float = 300.0


@dataclass
class Service:
    """Ranks requests as they come: `workers` at once, each up to `batch_size` that wait.

    name: of the model, as clients may call it; images: folder of pages given by path; urls: fetch http(s) URLs?
    """

    ranker: Ranker
    name: str
    mode: str = "reason"
    batch_size: int = 8
    workers: int = 1
    images: Path | None = None
    urls: bool = False
    key: str | None = None
    limits: Limits = field(default_factory=Limits)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        paths = ("/v1/rerank", "/v2/rerank", "/rerank")
        routes = [Route(path, self._answered(self._rerank), methods=["POST"]) for path in paths]
        routes += [Route("/health", self._health), Route("/v1/models", self._answered(self._models))]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette):
        self._queue: asyncio.Queue[tuple[Pair, asyncio.Future[Ranking]]] = asyncio.Queue(self.limits.waiting)
        tasks = [asyncio.create_task(self._work()) for _ in range(self.workers)]
        async with httpx.AsyncClient(timeout=min(30.0, self.limits.seconds)) as self._client:
            yield
        for task in tasks:
            task.cancel()

    def _answered(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> JSONResponse:
            try:
                self._check_key(request)
                return JSONResponse(await handler(request))
            except RefusedError as error:
                status, message = error.status, str(error)
            except Exception:  # a fault of ours: the client hears that, the log why
                logger.exception("a request failed")
                status, message = 500, "the server failed; its log says why"
            kind = "invalid_request_error" if status < 500 else "server_error"
            headers = {"Retry-After": "1"} if status == 429 else None
            return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)

        return answer

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise RefusedError(401, "the key is missing or wrong: send 'Authorization: Bearer KEY'")

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": self.name, "mode": self.mode, "waiting": self._queue.qsize()})

    async def _models(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "mmr5-lab"}]}

    async def _rerank(self, request: Request) -> dict[str, Any]:
        body = await self._body(request)
        query, documents, most = self._checked(body)
        pages = [await self._page(document, f"documents[{i}]") for i, document in enumerate(documents)]
        ranking = await self._ranked((query, pages), request)
        scores = relevance(ranking, self.mode)
        results = [{"index": i, "relevance_score": scores[i]} for i in ranking.order[:most]]
        if body.get("return_documents"):
            results = [{**result, "document": documents[int(result["index"])]} for result in results]
        answer: dict[str, Any] = {
            "id": f"rerank-{uuid.uuid4().hex}",
            "object": "rerank",
            "model": self.name,
            "results": results,
        }
        if body.get("return_reasoning"):
            answer |= {"reasoning": ranking.reasoning, "faults": sorted(ranking.faults)}
        return {**answer, "usage": {"completion_tokens": ranking.tokens}}

    async def _body(self, request: Request) -> dict[str, Any]:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.limits.bytes:
                raise RefusedError(
                    413, f"the request has more than {self.limits.bytes:,} bytes: send fewer or smaller pages"
                )
        try:
            body = json.loads(data)
        except ValueError as error:  # also bytes that are not UTF-8
            raise RefusedError(400, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise RefusedError(400, "the body is not a JSON object with 'query' and 'documents'")
        return body

    def _checked(self, body: dict[str, Any]) -> tuple[str, list[Any], int]:
        """Return the query, the documents and how many results are wanted at most."""
        name, query, documents = body.get("model") or self.name, body.get("query"), body.get("documents")
        if name != self.name:
            raise RefusedError(404, f"there is no model {name!r:.100} here: this server has {self.name!r}")
        if isinstance(query, dict):
            query = query.get("text")
        if not isinstance(query, str) or not query.strip():
            raise RefusedError(400, "'query' must be a text that is not empty")
        if not isinstance(documents, list) or not documents:
            raise RefusedError(400, "'documents' must be a list of at least one page")
        if len(documents) > self.limits.documents:
            raise RefusedError(400, f"{len(documents)} documents are too many: send {self.limits.documents} at most")
        most = body.get("top_n")
        if most is not None and (type(most) is not int or most < 0):  # 0: all, as in vLLM
            raise RefusedError(400, f"'top_n' is {most!r:.50}: it must be a whole number")
        return query, documents, most or len(documents)

    async def _page(self, document: Any, where: str) -> bytes | TextPage:
        """Return the image file of a document, or its text, or both."""
        content = document.get("content") if isinstance(document, dict) else None
        texts, images = [], []
        for part in content if isinstance(content, list) else [document]:
            if isinstance(part, str) and not part.startswith("data:image/"):
                texts.append(part)
            elif isinstance(part, str):
                images.append(part)
            elif isinstance(part, dict):
                texts += [part["text"]] if isinstance(part.get("text"), str) else []
                image = part.get("image") or part.get("image_url")
                image = image.get("url") if isinstance(image, dict) else image
                images += [image] if isinstance(image, str) else []
        if len(images) > 1 or not (images or texts):
            what = f"{len(images)} images" if images else "neither an image nor a text"
            raise RefusedError(400, f'{where} has {what}: give {{"image": …}} or {{"text": …}}')
        text = "\n".join(texts)[:LONGEST_TEXT]
        if not images:
            return TextPage(text)
        data = await self._image(images[0], where)
        return TextPage(text, data) if text else data

    async def _image(self, value: str, where: str) -> bytes:
        if value.startswith(("http://", "https://")):
            return await self._fetched(value, where)
        if value.startswith("data:"):
            return _decoded(value.partition(",")[2], where)
        return self._in_folder(value, where) or _decoded(value, where)

    async def _fetched(self, url: str, where: str) -> bytes:
        if not self.urls:
            raise RefusedError(400, f"{where} is an http(s) URL, and this server fetches none: send the image itself")
        try:
            async with self._client.stream("GET", url) as response:
                response.raise_for_status()
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > self.limits.bytes:
                        raise RefusedError(413, f"{where}: the image has more than {self.limits.bytes:,} bytes")
                return bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RefusedError(400, f"{where} could not be fetched: {error!r:.200}") from None

    def _in_folder(self, name: str, where: str) -> bytes | None:
        """Return a file of the folder of pages; None where there is no such file."""
        if self.images is None or len(name) > 4096 or "\0" in name:
            return None
        folder = self.images.resolve()
        path = (folder / name.removeprefix("file://")).resolve()  # after links: none may lead out
        if not path.is_relative_to(folder):
            raise RefusedError(403, f"{where} is outside the folder of pages of this server")
        try:
            return path.read_bytes()
        except OSError:  # no such file, or base64 that looks like a path
            return None

    async def _ranked(self, pair: Pair, request: Request) -> Ranking:
        """Return the ranking of a request that waits its turn, or raise `RefusedError`."""
        ours: asyncio.Future[Ranking] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.to_thread(self.ranker.check, [pair])
            self._queue.put_nowait((pair, ours))
        except ValueError as error:
            raise RefusedError(400, _of_one(error, pair[0])) from None
        except asyncio.QueueFull:
            raise RefusedError(429, f"{self.limits.waiting} requests are waiting already: try again later") from None
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        while not ours.done():
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait([ours], timeout=max(0.0, min(LEFT, left)))
            if not ours.done() and (left <= 0 or await request.is_disconnected()):
                ours.cancel()
                raise RefusedError(
                    504, f"no answer within {self.limits.seconds:g} seconds: send fewer pages, or try later"
                )
        return ours.result()

    async def _work(self) -> None:
        """Rank what waits, for ever. Requests that were given up are left out."""
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(pair, ours) for pair, ours in batch if not ours.done()]
            outcomes = await asyncio.to_thread(self._outcomes, [pair for pair, _ in batch])
            for (_, ours), outcome in zip(batch, outcomes, strict=True):
                if not ours.done():
                    ours.set_exception(outcome) if isinstance(outcome, Exception) else ours.set_result(outcome)

    def _outcomes(self, pairs: Sequence[Pair]) -> list[Ranking | Exception]:
        """Return a ranking, or what to raise, for each pair; together if that works, else one by one."""
        done: dict[int, Ranking | Exception] = {}
        try:
            for i, ranking in self.ranker.rank_each(pairs, self.mode, self.batch_size) if pairs else ():
                done[i] = ranking  # noqa: PERF403 (those before a failure count)
        except RemoteError as error:
            done |= {
                i: RefusedError(502, f"the model's server failed: {reason}") for i, reason in error.failures.items()
            }
        except Exception as error:
            if len(pairs) > 1:
                return [done[i] if i in done else self._outcomes([pair])[0] for i, pair in enumerate(pairs)]
            done[0] = RefusedError(400, _of_one(error, pairs[0][0])) if isinstance(error, ValueError) else error
        return [done.get(i) or RefusedError(502, "the model's server was not asked") for i in range(len(pairs))]


def _of_one(error: Exception, query: str) -> str:
    """Return a message about the only pair of a batch in the words of the interface."""
    message = str(error).removeprefix(name_pair(0, query)).lstrip(",: ")
    return re.sub(r"^page (\d+)", r"documents[\1]", message)


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RefusedError(400, f"{where} is neither base64 nor a page of this server: {error}") from None


def serve(
    model: str | None,
    *,
    host: str,
    port: int,
    images: str | None,
    allow_urls: bool,
    mode: str,
    batch_size: int,
    documents: int,
    waiting: int,
    timeout: float,
    **ranker: Any,
) -> None:
    """Serve a model here, or one on a chat server, until the process is ended. ranker: options of `open_ranker`.

    Clients must send the key that stands in the environment variable `MMR5_SERVE_KEY`, where it is set.
    """
    import uvicorn

    from mmr5_lab.reranking.opening import open_ranker

    if not model:
        raise ValueError("which model is to be served? Name it with --model")
    opened = open_ranker(model, **ranker)
    remote = getattr(opened, "concurrency", 0)  # a server batches by itself
    service = Service(
        opened,
        Path(model).name if Path(model).is_dir() else model,
        mode,
        batch_size=1 if remote else batch_size,
        workers=remote or 1,
        images=Path(images) if images else None,
        urls=allow_urls,
        key=os.environ.get(KEY),
        limits=Limits(documents=documents, waiting=waiting, seconds=timeout),
    )
    uvicorn.run(service.app(), host=host, port=port, log_level="info", timeout_graceful_shutdown=int(timeout))
