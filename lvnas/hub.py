"""The Hugging Face Hub: where bases of short names are, and `lvnas pack --push-to-hub`."""

from pathlib import Path
from typing import Any

from lvnas.errors import InputError

HUB = {
    "llama-3.2-11b-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama-3.2-90b-vision": "meta-llama/Llama-3.2-90B-Vision-Instruct",
}
"""Short name of a base -> its repository."""


def repositories(manifest: dict[str, Any], target: str) -> dict[str, str]:
    """Adapter name -> repository: `target` is owner/name for a single adapter, or an owner, whose repositories take
    the adapters' names.

    Raises:
        InputError: owner/name for several adapters, or neither form.
    """
    names = [entry["name"] for entry in manifest["adapters"]]
    if target.count("/") > 1 or not all(target.split("/")):
        raise InputError(f"--push-to-hub {target!r}: expected an owner, or owner/name for a single adapter")
    if "/" in target and len(names) > 1:
        raise InputError(
            f"--push-to-hub {target!r} names one repository for {len(names)} adapters; give only the owner"
        )
    return {names[0]: target} if "/" in target else {name: f"{target}/{name}" for name in names}


def push(pack: Path, manifest: dict[str, Any], target: str, private: bool = False) -> dict[str, str]:
    """Uploads each adapter's folder, so that PEFT and vLLM can load the repository by its name.

    Returns:
        Adapter name -> address of the commit.

    Raises:
        InputError: the Hub refuses (no token, no right to write) or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, addresses = HfApi(), {}
    paths = {entry["name"]: entry["path"] for entry in manifest["adapters"]}
    for name, repository in repositories(manifest, target).items():
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            message = f"Add {paths[name].rpartition('/')[2]}"
            commit = api.upload_folder(
                repo_id=repository, folder_path=pack / paths[name], commit_message=message
            )
        except (HfHubHTTPError, OSError) as error:
            raise InputError(
                f"the Hub did not take {repository}: {str(error).strip().splitlines()[0]}"
            ) from None
        addresses[name] = str(commit.commit_url)
    return addresses
