"""Upload of a run to the Hub: one atomic commit of weights, tokenizer, code and card.

`upload_plan` says what is sent and what stays at home, `leak_check` is the gate, `push_run` sends. Large files go up
first and the commit comes last: an interrupted upload leaves the repository as it was, and running it again sends only
the files that are missing. A new repository is private unless asked otherwise, and a card that somebody has edited on
the Hub is left as it is.
"""

import fnmatch
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_model_cards.card.hand_edits import is_edited
from deepseek_model_cards.hub.leak_check import UploadFile, check_leaks, describe_search
from deepseek_model_cards.hub.upload_plan import CARD, HeldBack, UploadPlan, plan_upload
from deepseek_model_cards.wording import format_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Left over from an earlier upload these would be loaded in place of, or on top of, the new weights.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")


def push_run(
    run_path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    license: str | None = None,
    template: str | Path | None = None,
    with_samples: bool = False,
    message: str = "Upload model, card and results",
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
) -> tuple[UploadPlan, str | None]:
    """Upload a run's model, card and results in one commit.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.
        repo_id: ``user/name`` on the Hub; made if it does not exist.
        private: Make a new repository private, and refuse one that is public.
        revision: The branch to commit to, made if it does not exist; the main branch by default.
        license: The license of the weights, as the Hub spells it; by default the base model's, if that is known.
        template: A Jinja template for the card in place of ours.
        with_samples: Also send the report with its prompts and completions.
        message: The commit's message.
        token: The access token; by default the one `hf auth login` stored, or ``HF_TOKEN``.
        endpoint: The server; huggingface.co by default, or ``HF_ENDPOINT``.
        dry_run: Check and list, and contact nobody.

    Returns:
        What was or would be sent and held back, and the commit's address (None for a dry run).

    Raises:
        ValueError: A malformed `repo_id`, an unknown license, something secret in a file, or the server's refusal, in
            one line.
        FileNotFoundError: There is no finished run, or it made no model.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_upload(
            run_path, repo_id, folder=folder, license=license, template=template, with_samples=with_samples
        )
        check_leaks(plan.files, folders=[Path(run_path).resolve(), folder, Path.home()])
        url = None
        if not dry_run:
            from deepseek_model_cards.hub.errors import one_line_errors

            with one_line_errors(repo_id):
                plan, url = _commit(plan, repo_id, private, revision, message=message, token=token, endpoint=endpoint)
        # What was written for the upload vanishes with the folder, so hand back its bytes.
        files = [_detach(file, folder) for file in plan.files]
        return UploadPlan(files, plan.held_back, plan.license, plan.is_card_edited), url


def check_repo_id(repo_id: str) -> None:
    """Refuse a repository id that is not ``user/name``.

    Args:
        repo_id: The id.

    Raises:
        ValueError: It is malformed.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"REPO: got {repo_id!r}, expected user/name") from None
    if "/" not in repo_id:
        raise ValueError(f"REPO: got {repo_id!r} without an owner, expected user/name")


def _detach(file: UploadFile, folder: Path) -> UploadFile:
    if isinstance(file.content, Path) and file.content.is_relative_to(folder):
        return UploadFile(file.path_in_repo, file.content.read_bytes())
    return file


def _commit(
    plan: UploadPlan,
    repo_id: str,
    private: bool,
    revision: str | None,
    *,
    message: str,
    token: str | None,
    endpoint: str | None,
) -> tuple[UploadPlan, str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"REPO: got {repo_id}, which is public, expected a private one; --public sends it there")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)
    plan = _keep_edited_card(api, plan, repo_id, revision) if CARD in there else plan
    operations = [
        CommitOperationAdd(file.path_in_repo, str(file.content) if isinstance(file.content, Path) else file.content)
        for file in plan.files
    ]
    operations += [CommitOperationDelete(name) for name in stale_weights(there, plan.files)]
    return plan, api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def _keep_edited_card(api: "HfApi", plan: UploadPlan, repo_id: str, revision: str | None) -> UploadPlan:
    """Leave out our card where the repository's was edited by hand.

    Raises:
        ValueError: Both the repository's card and the run's hold edits.
    """
    text = edited_card_on_hub(api, repo_id, revision)
    ours = next(file for file in plan.files if file.path_in_repo == CARD)
    content = ours.content if isinstance(ours.content, bytes) else ours.content.read_bytes()
    if text is None or text == content.decode("utf-8"):
        return plan
    if plan.is_card_edited:
        raise ValueError(
            f"{CARD}: got edits both in the run and in {repo_id}, expected them in one; bring them together in the "
            "run, then delete the other"
        )
    held = HeldBack(CARD, f"the one in {repo_id} was edited there and stays; delete it there to have this one")
    files = [file for file in plan.files if file is not ours]
    return UploadPlan(files, [*plan.held_back, held], plan.license)


def edited_card_on_hub(api: "HfApi", repo_id: str, revision: str | None = None) -> str | None:
    """Return the repository's card where somebody has edited it; None where it is ours or there is none.

    Args:
        api: The client.
        repo_id: The repository.
        revision: The branch; the main branch by default.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError):
            return None
        text = Path(path).read_text(encoding="utf-8")
    return text if is_edited(text) else None


def stale_weights(there: list[str], files: Sequence[UploadFile]) -> list[str]:
    """Return the weight files of an earlier upload that the new one does not replace.

    transformers takes ``model.safetensors`` before any shards, so a sharded model pushed over a whole one would load
    the old weights.

    Args:
        there: The repository's files.
        files: What is sent.
    """
    sent = {file.path_in_repo for file in files}
    return [name for name in there if name not in sent and any(fnmatch.fnmatch(name, kind) for kind in WEIGHT_FILES)]


def describe_plan(plan: UploadPlan) -> str:
    """Return what is sent, what stays at home and why, and what was looked for, as text for a terminal.

    Args:
        plan: What was or would be sent.
    """
    total = format_bytes(sum(file.num_bytes for file in plan.files))
    width = max(len(name) for name in (file.path_in_repo for file in plan.files))
    sent = [f"  {file.path_in_repo.ljust(width)}  {format_bytes(file.num_bytes):>10}" for file in plan.files]
    width = max((len(held.path) for held in plan.held_back), default=0)
    held = [f"  {held.path.ljust(width)}  {held.reason}" for held in plan.held_back]
    card = "the run's own README.md, with its edits" if plan.is_card_edited else "written from the run"
    return "\n".join(
        [
            f"sent: {len(plan.files)} files, {total}; license {plan.license}; card {card}",
            *sent,
            f"held back: {len(plan.held_back)}",
            *held,
            "looked for in what is sent, and not found:",
            *(f"  {line}" for line in describe_search()),
        ]
    )
