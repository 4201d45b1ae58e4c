"""Makes a table the default of a bundle: the file first, the manifest that lists it last."""

import hashlib
from pathlib import Path

from kttools.bundle.atomic import atomic_write_bytes
from kttools.bundle.hashing import digest_file
from kttools.bundle.manifest import manifest_parts, table_names, write_manifest
from kttools_runtime import strict_json
from kttools_runtime.expert_table import BUNDLE_TABLE, MAX_TABLE_BYTES, parse_table
from kttools_runtime.manifest import Manifest, read_manifest


def install_table(bundle: Path, table: Path, fingerprint: str) -> Manifest:
    """Copies `table` into the bundle as its default. Raises InvalidInputError for another model's table.

    Cut off in between, the bundle is sound without a default table, and a second run completes it.
    """
    manifest = read_manifest(bundle)
    data = strict_json.read_bounded(table, MAX_TABLE_BYTES)
    parse_table(data, str(table), manifest.model, fingerprint)
    parts = manifest_parts(manifest)
    listed = parts["files"].pop(BUNDLE_TABLE, None)
    if listed is not None and listed.sha256 != hashlib.sha256(data).hexdigest():
        tables = table_names(bundle, list(parts["files"]))
        write_manifest(bundle, **parts | {"expert_tables": tables})  # lets go of the file that is replaced
    atomic_write_bytes(bundle / BUNDLE_TABLE, data)
    parts["files"][BUNDLE_TABLE] = digest_file(bundle / BUNDLE_TABLE)
    tables = table_names(bundle, list(parts["files"]))
    return write_manifest(bundle, **parts | {"fingerprint": fingerprint, "expert_tables": tables})
