#!/usr/bin/env bash
# Mount the local SSDs of a Google Cloud machine, attached as NVMe, at a directory; --help says how.

# shellcheck disable=SC2034  # nvme.sh reads it
DRIVE_MODEL='^nvme_card[0-9]*$' # persistent disks, which are slower and are kept, are nvme_card-pd
# shellcheck source-path=SCRIPTDIR source=nvme.sh
source "$(dirname "${BASH_SOURCE[0]}")/nvme.sh"
nvme_main "$@"
