#!/usr/bin/env bash
# Mount the instance store of an AWS machine, its local NVMe drives, at a directory; --help says how.

# shellcheck disable=SC2034  # nvme.sh reads it
DRIVE_MODEL='^Amazon EC2 NVMe Instance Storage'
# shellcheck source-path=SCRIPTDIR source=nvme.sh
source "$(dirname "${BASH_SOURCE[0]}")/nvme.sh"
nvme_main "$@"
