#!/usr/bin/env bash
# The inside of a test cluster; cluster.py starts it, in namespaces of its own, and has written FOLDER/etc.
#
#   cluster.sh controller FOLDER NODES    process 1 of the cluster: a network, munged, slurmctld, the nodes
#   cluster.sh node FOLDER NUMBER         switch a node on, and wait until it is off
#
# A node is a network, process, mount and host-name namespace within the controller's: killing its first process is a
# power-off, and when the controller's first process ends nothing is left, neither process nor mount nor interface.
set -euo pipefail
task=$1 folder=$2 number=$3
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$folder/etc/slurm.conf
net=10.77.0

# What host this is, who the others are, and no name server: a look-up fails at once instead of after 20 seconds.
become() { # NAME
  hostname "$1"
  mount --bind "$folder/etc/hosts" /etc/hosts
  mount --bind "$folder/etc/resolv.conf" /etc/resolv.conf
  ip link set lo up
}

controller() {
  become ctl
  mount -t tmpfs -o size=1m,mode=1777 tmpfs "$folder/full" # the same small disk on every node
  ip link add br0 type bridge
  ip addr add $net.254/24 dev br0
  ip link set br0 up
  munged --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munge/pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" --num-threads=4 --force
  slurmctld -D -c -f "$SLURM_CONF" > "$folder/log/slurmctld.out" 2>&1 &
  for ((i = 1; i <= number; i++)); do "$0" node "$folder" "$i" > "$folder/log/n$i.out" 2>&1 & done
  while true; do # reaps whoever lost its parent; a signal ends it
    sleep 3600 &
    wait $!
  done
}

node() {
  unshare --net --mount --uts --ipc --pid --fork --kill-child=KILL --mount-proc "$0" inside "$folder" "$number" &
  local pid=$!
  echo $pid > "$folder/pid/n$number"
  # The cable can be plugged in once the namespace is there.
  until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
  ip link add "v$number-$pid" type veth peer name eth0 netns "$pid"
  ip link set "v$number-$pid" master br0 up
  wait $pid
}

inside() {
  become "n$number"
  mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm
  mount --bind "$folder/disk/n$number" "$folder/scratch" # this node's own disk
  until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
  ip addr add "$net.$number/24" dev eth0
  ip link set eth0 up
  slurmd -D -N "n$number" -f "$SLURM_CONF" &
  wait $!
}

"$task"
