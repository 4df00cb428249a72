#!/usr/bin/env bash
# A bill of materials (CycloneDX 1.6, JSON) of the two programs: every crate that is compiled into one of them, with
# version, licence, checksum and users.
#   scripts/sbom.sh >sbom.json
# The same sources give the same bytes. It needs cargo and Python 3.11 or later, and no network once cargo has the crates.
# cargo-cyclonedx 0.5.9 makes one file for each program, and cargo would have to compile 179 crates for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# For the platform of the images. Python reads its script from standard input, so the metadata is in a file.
metadata=$(mktemp)
trap 'rm -f "$metadata"' EXIT
cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu >"$metadata"

python3 - "$metadata" <<'PYTHON'
import hashlib, json, sys, tomllib, uuid

PROGRAMS = ("event-service", "booking-service")

metadata = json.load(open(sys.argv[1], encoding="utf-8"))
with open("Cargo.lock", "rb") as lock:
    lock_bytes = lock.read()
checksums = {(package["name"], package["version"]): package.get("checksum")
             for package in tomllib.loads(lock_bytes.decode())["package"]}
packages = {package["id"]: package for package in metadata["packages"]}
# Only crates that are compiled in: no tests, and no dependencies of build scripts.
uses = {node["id"]: sorted({dependency["pkg"] for dependency in node["deps"]
                            if any(kind["kind"] is None for kind in dependency["dep_kinds"])})
        for node in metadata["resolve"]["nodes"]}

def reference(package):
    return f"pkg:cargo/{package['name']}@{package['version']}"

def component(package):
    made = {
        "type": "application" if package["name"] in PROGRAMS else "library",
        "bom-ref": reference(package),
        "name": package["name"],
        "version": package["version"],
        "purl": reference(package),
    }
    if package["license"]:
        # Some old crates write "MIT/Apache-2.0", which is not a valid expression.
        made["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    checksum = checksums[package["name"], package["version"]]
    if checksum:
        made["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["repository"]:
        made["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return made

roots = [package["id"] for package in metadata["packages"] if package["name"] in PROGRAMS]
assert len(roots) == len(PROGRAMS), "the programs are not in the workspace"
found, left = set(), list(roots)
while left:
    one = left.pop()
    if one not in found:
        found.add(one)
        left += uses[one]
by_name = sorted((packages[one] for one in found), key=lambda package: (package["name"], package["version"]))
version = packages[roots[0]]["version"]
system = {"type": "application", "bom-ref": f"ticketing@{version}", "name": "ticketing", "version": version}
dependencies = [{"ref": system["bom-ref"], "dependsOn": sorted(reference(packages[root]) for root in roots)}]
dependencies += [{"ref": reference(package), "dependsOn": [reference(packages[used]) for used in uses[package["id"]]]}
                 for package in by_name]
digest = hashlib.sha256(lock_bytes).digest()[:16]
json.dump({
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest, version=4)}",
    "version": 1,
    "metadata": {"component": system},
    "components": [component(package) for package in by_name],
    "dependencies": dependencies,
}, sys.stdout, indent=2)
print()
PYTHON
