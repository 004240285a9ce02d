# shellcheck shell=bash
# Stripe NVMe drives, make an XFS on them and mount it: what mount_nvme_aws.sh and mount_nvme_gcp.sh share.
#
# Sourced by a script that sets DRIVE_MODEL, a regular expression of the drives' model as lsblk tells it, and calls
# nvme_main "$@". Nothing is written before every drive has been looked at.

LABEL=flexgen
ARRAY=/dev/md/$LABEL

usage() {
  cat <<TEXT
Usage: ${0##*/} [--dry-run] [--drives N] [--drive DEVICE]... [--erase DEVICE]... DIRECTORY

Mounts the machine's local NVMe drives at DIRECTORY as one XFS, striped (RAID-0) where they are several.
A second run changes nothing. A drive that holds anything is refused.

  --drives N       use the first N of the drives that are found; by default all
  --drive DEVICE   use this drive instead of looking for some; may be given several times
  --erase DEVICE   what this drive holds may be lost; may be given several times
  --dry-run        print the commands only

Local drives are empty after the machine was stopped: run this at each start.
TEXT
}

die() {
  echo "error: $*" >&2
  exit 1
}

run() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
  [[ $dry_run == yes ]] || "$@"
}

find_drives() { # prints the machine's local drives, one a line
  lsblk -dnrpo NAME,TYPE,MODEL | sed 's/\\x20/ /g' | while read -r name type model; do
    if [[ $type == disk && $model =~ $DRIVE_MODEL ]]; then echo "$name"; fi
  done | sort -V
}

in_use() { # prints what uses a drive: the arrays and volumes on it, where it and its partitions are mounted
  lsblk -nrpo NAME,TYPE,MOUNTPOINT "$1" | while read -r name type place; do
    if [[ $name != "$1" && $type != part ]]; then echo "$type $name"; fi
    if [[ -n $place ]]; then echo "mounted at $place"; fi
  done | paste -sd, -
}

signatures() { # prints what kind of data a drive begins or ends with
  wipefs --no-act --noheadings --output TYPE "$1" 2>/dev/null | sort -u | paste -sd, -
}

contains() { # contains ITEM LIST...
  local item=$1 other
  shift
  for other in "$@"; do [[ $item == "$other" ]] && return 0; done
  return 1
}

label_of() {
  blkid --probe --output value --match-tag LABEL "$1" 2>/dev/null || true
}

is_mounted() { # whether DIRECTORY is a mount; dies where it is not of these drives
  local source drive lineage
  source=$(findmnt --noheadings --output SOURCE --mountpoint "$directory") || return 1
  mapfile -t lineage < <(lsblk -nsrpo NAME "$source" 2>/dev/null)
  for drive in "${drives[@]}"; do
    contains "$drive" "${lineage[@]}" ||
      die "$directory is a mount of $source already, without $drive; unmount it, or name another directory"
  done
  echo "$directory is mounted from ${drives[*]} already; nothing was changed"
}

check_drives() { # dies where a drive is in use, or holds what may not be erased
  local drive use held
  for drive in "${drives[@]}"; do
    use=$(in_use "$drive")
    [[ -z $use ]] || die "$drive is in use ($use); unmount and stop what uses it, or name other drives with --drive"
    held=$(signatures "$drive") || die "$drive cannot be read; run this with sudo"
    [[ -z $held ]] || contains "$drive" "${erase[@]}" ||
      die "$drive holds data ($held); --erase $drive says that it may be lost"
  done
}

is_ours() { # whether the drives hold what an earlier run of this made, and it is not mounted elsewhere
  local drive kind=xfs
  ((${#drives[@]} == 1)) || kind=linux_raid_member
  for drive in "${drives[@]}"; do
    [[ $(signatures "$drive") == "$kind" ]] || return 1
    [[ $(label_of "$drive") =~ (^|:)$LABEL$ ]] || return 1 # an array's name may begin with the host's
    [[ $(in_use "$drive") != *mounted* ]] || return 1
  done
}

create() { # makes the file system; sets volume
  local drive
  for drive in "${drives[@]}"; do
    [[ -z $(signatures "$drive") ]] || run wipefs --all --quiet "$drive"
  done
  if ((${#drives[@]} == 1)); then
    volume=${drives[0]}
  else
    volume=$ARRAY
    run mdadm --create "$ARRAY" --name="$LABEL" --level=0 --raid-devices=${#drives[@]} --chunk=1M --run "${drives[@]}"
  fi
  run mkfs.xfs -q -f -L "$LABEL" "$volume"
}

reopen() { # finds the file system of an earlier run; sets volume
  volume=${drives[0]}
  ((${#drives[@]} > 1)) || return 0
  volume=$(lsblk -nrpo NAME,TYPE "${drives[0]}" | awk '$2 == "raid0" {print $1}')
  [[ -z $volume ]] || return 0
  volume=$ARRAY
  run mdadm --assemble "$ARRAY" "${drives[@]}"
}

parse() { # sets dry_run, count, drives, erase and directory
  dry_run=no count='' directory='' drives=() erase=()
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=yes ;;
      --drives | --drive | --erase)
        [[ -n ${2:-} ]] || die "$1 needs a value"
        case $1 in
          --drives) count=$2 ;;
          --drive) drives+=("$(readlink -f "$2")") ;;
          --erase) erase+=("$(readlink -f "$2")") ;;
        esac
        shift
        ;;
      -*) die "$1 is no option of this; --help lists them" ;;
      *)
        [[ -z $directory ]] || die "$directory and $1 are two directories; give one"
        directory=$1
        ;;
    esac
    shift
  done
  [[ -n $directory ]] || die "there is no directory to mount at; --help says how this is called"
  [[ -z $count || $count =~ ^[1-9][0-9]*$ ]] || die "--drives is $count; it must be a whole number of at least 1"
}

choose_drives() { # completes drives
  local wanted
  if ((${#drives[@]} == 0)); then
    mapfile -t drives < <(find_drives)
    ((${#drives[@]})) || die "no local NVMe drives (model $DRIVE_MODEL) are here; name some with --drive"
  fi
  wanted=${count:-${#drives[@]}}
  ((${#drives[@]} >= wanted)) || die "$wanted drives are asked for and ${#drives[@]} are here: ${drives[*]}"
  drives=("${drives[@]:0:wanted}")
}

require() { # require PROGRAM PACKAGE: dies where it is not installed
  [[ $dry_run == yes ]] || command -v "$1" >/dev/null || die "$1 is not installed; on Debian and Ubuntu: apt install $2"
}

nvme_main() {
  set -euo pipefail
  parse "$@"
  if [[ $dry_run == no ]]; then
    ((EUID == 0)) || die "only root can make and mount file systems; run this with sudo, or with --dry-run"
  fi
  choose_drives
  if is_mounted; then return; fi
  ((${#drives[@]} == 1)) || require mdadm mdadm
  require mkfs.xfs xfsprogs
  if is_ours; then
    echo "${drives[*]} hold the file system of an earlier run; it is mounted as it is"
    reopen
  else
    check_drives
    create
  fi
  run mkdir -p "$directory"
  run mount -t xfs -o noatime "$volume" "$directory"
  run chown "${SUDO_UID:-$EUID}:${SUDO_GID:-$EUID}" "$directory"
}
