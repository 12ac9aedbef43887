"""A collection on the Hub that pushed models are added to: by its slug, or by its title, and then made if need be."""

import re

from huggingface_hub import HfApi

_SLUG = re.compile(r"[^/\s]+/[^/\s]+-[0-9a-f]{24}")


def add_to_collection(api: HfApi, repo_id: str, collection: str, *, private: bool) -> str:
    """Add a model to a collection of its namespace, or to the one of a slug; return the collection's URL.

    Args:
        private: for a collection that is made.
    """
    slug = collection if _SLUG.fullmatch(collection) else _find_or_make(api, repo_id, collection, private=private)
    return api.add_collection_item(slug, repo_id, "model", exists_ok=True).url


def _find_or_make(api: HfApi, repo_id: str, title: str, *, private: bool) -> str:
    namespace = repo_id.partition("/")[0]
    for found in api.list_collections(owner=namespace):
        if found.title == title:
            return found.slug
    return api.create_collection(title, namespace=namespace, private=private, exists_ok=True).slug
