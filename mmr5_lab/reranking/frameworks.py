"""Our rerankers in other people's frameworks: mteb, and sentence-transformers' `CrossEncoder`.

    mteb.evaluate(MtebReranker(reranker, "MM-R5"), task.convert_to_reranking("predictions", top_k=10))
    ListwiseCrossEncoder(reranker).rank(query, pages)     # predict and rank of `CrossEncoder`, over mode "score"
    export_cross_encoder("my_model", "my_cross_encoder")  # a folder that `CrossEncoder` itself loads, mode "pointwise"

mteb and sentence-transformers are not needed to import this module.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmr5_lab.images import Page
from mmr5_lab.models.loading import load_model
from mmr5_lab.prompting.prompts import build_pointwise_messages
from mmr5_lab.reranking.inputs import pointwise_tokens
from mmr5_lab.reranking.pages import Pair, TextPage
from mmr5_lab.reranking.ranking import Ranker, relevance

_EXTRA = 'pip install "mmr5-lab[{}]"'


class MtebReranker:
    """A ranker as mteb 2.26 searches with it: it reranks the candidates of a first stage, page images or texts.

    name: under which mteb files the results; without an organisation, "mmr5-lab/" stands before it

    Scores are those of `ranking.relevance`, so in modes without scores 1 / rank. A document with image and text shows
    the model its image; with `texts`, both.
    """

    def __init__(self, ranker: Ranker, name: str, *, mode: str = "reason", texts: bool = False, batch_size: int = 16):
        try:
            from mteb.models import ModelMeta
        except ImportError:
            raise RuntimeError(f"the wrapper for mteb needs mteb: {_EXTRA.format('mteb')}") from None
        name = name if "/" in name else f"mmr5-lab/{name}"
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": mode})
        self._ranker, self._mode, self._texts, self._batch_size = ranker, mode, texts, batch_size
        self._rows: Any = None
        self._number: dict[str, int] = {}

    def index(self, corpus: Any, **about: Any) -> None:
        """Take the documents of a task: a dataset with columns id and image or text, or both."""
        self._rows, self._number = corpus, {str(name): row for row, name in enumerate(corpus["id"])}

    def search(
        self, queries: Any, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **about: Any
    ) -> dict[str, dict[str, float]]:
        """Rank each query's candidates and return the scores of the best `top_k`.

        Raises ValueError where the task has no candidates, or a query none.
        """
        if not top_ranked:
            raise ValueError(
                "a reranker needs the candidates of a first stage: run mteb.evaluate with a retriever and"
                " prediction_folder, then task.convert_to_reranking(that folder, top_k=10)"
            )
        texts = {str(name): text for name, text in zip(queries["id"], queries["text"], strict=True)}
        if missing := [name for name in texts if not top_ranked.get(name)]:
            raise ValueError(f"{len(missing)} queries have no candidates, such as {missing[0]!r}")
        candidates = {name: [str(document) for document in top_ranked[name]] for name in texts}
        pairs: list[Pair] = [(texts[name], [self._page(d) for d in shown]) for name, shown in candidates.items()]
        rankings = self._ranker.rank_many(pairs, self._mode, self._batch_size)
        found = {}
        for (name, shown), ranking in zip(candidates.items(), rankings, strict=True):
            scores = relevance(ranking, self._mode)
            found[name] = {shown[k]: scores[k] for k in ranking.order[:top_k]}
        return found

    def _page(self, document: str) -> Page | TextPage:
        row = self._rows[self._number[document]]
        image, text = row.get("image"), row.get("text") or ""
        if image is None:
            return TextPage(text)
        return TextPage(text, image) if self._texts and text else image


class ListwiseCrossEncoder:
    """`predict` and `rank` of sentence-transformers' `CrossEncoder` over a ranker that sees a query's pages together.

    A page is a path, bytes, a PIL image, or {"text": …, "image": …}. A score depends on the pages beside it: those of a
    query must stand in one call.
    """

    def __init__(self, ranker: Ranker, mode: str = "score"):
        self._ranker, self._mode = ranker, mode

    def predict(self, inputs: Sequence[tuple[str, Any]], batch_size: int = 16) -> np.ndarray:
        """Return the relevance of each (query, page), shape (inputs,); pairs of a query are ranked together."""
        places: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(inputs):
            places.setdefault(query, []).append(place)
        pairs = [(query, [_shown(inputs[k][1]) for k in at]) for query, at in places.items()]
        scores = np.zeros(len(inputs))
        for at, ranking in zip(places.values(), self._ranker.rank_many(pairs, self._mode, batch_size), strict=True):
            scores[at] = relevance(ranking, self._mode)
        return scores

    def rank(
        self, query: str, documents: Sequence[Any], top_k: int | None = None, return_documents: bool = False
    ) -> list[dict[str, Any]]:
        """Return {"corpus_id", "score"} of the best pages, best first, and "text" (the document as given)."""
        ranking = self._ranker.rank(query, [_shown(document) for document in documents], self._mode)
        scores = relevance(ranking, self._mode)
        best: list[dict[str, Any]] = [{"corpus_id": k, "score": scores[k]} for k in ranking.order[:top_k]]
        if return_documents:
            for hit in best:
                hit["text"] = documents[hit["corpus_id"]]
        return best


def _shown(document: Any) -> Any:
    return TextPage(document["text"], document.get("image")) if isinstance(document, Mapping) else document


def export_cross_encoder(model: str | Path, folder: str | Path) -> None:
    """Save a model, in mode "pointwise", as a folder that sentence-transformers' `CrossEncoder` loads by itself.

    `CrossEncoder(folder).predict([(query, page image), …])` gives the probabilities of mode "pointwise". The other
    modes look at several pages at once, which a `CrossEncoder` cannot do: for them there is `ListwiseCrossEncoder`.

    Raises RuntimeError without sentence-transformers, ValueError for a model that cannot tell the two answers apart.
    """
    try:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore
    except ImportError:
        raise RuntimeError(
            f"exporting a CrossEncoder needs sentence-transformers 5.4 or newer: {_EXTRA.format('retrieval')}"
        ) from None
    loaded, processor = load_model(model, device="cpu")
    yes, no = pointwise_tokens(processor.tokenizer)
    processor.chat_template = _pair_template(processor)
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)
    rendering = {"chat_template": {"add_generation_prompt": False}}  # the template ends where the answer begins
    transformer = Transformer(str(folder), transformer_task="any-to-any", processing_kwargs=rendering)
    CrossEncoder(modules=[transformer, LogitScore(yes, no)]).save_pretrained(str(folder))


def _pair_template(processor: Any) -> str:
    """Return a chat template that renders the pointwise prompt of a pair, two messages of roles query and document."""
    query, image = "QUERY-GOES-HERE", "IMAGE-GOES-HERE"

    def rendered(page: dict[str, str]) -> str:
        messages = [
            {**message, "content": [page if part["type"] == "image" else part for part in message["content"]]}
            for message in build_pointwise_messages(query)
        ]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    before, rest = rendered({"type": "text", "text": image}).split(image)
    between, after = rest.split(query)
    shown = rendered({"type": "image"}).split(query)[0].removeprefix(before).removesuffix(between)
    text = "{{ part['text'] | replace('<|', '< |') }}"  # no control token comes from a question or a page
    page = "{% if part['type'] == 'image' %}" + f"{{{{ {json.dumps(shown)} }}}}" + "{% else %}" + text + "{% endif %}"

    def each(role: str, part: str) -> str:
        messages = f"{{% for message in messages if message['role'] == '{role}' %}}"
        return messages + "{% for part in message['content'] %}" + part + "{% endfor %}{% endfor %}"

    fixed = [f"{{{{ {json.dumps(piece)} }}}}" for piece in (before, between, after)]
    return fixed[0] + each("document", page) + fixed[1] + each("query", text) + fixed[2]
