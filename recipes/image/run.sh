#!/bin/sh
# Written by inv image. Starts @title: sh run.sh podman|docker [OPTION OF THE ENGINE...]
#   COMFYUI_DATA    a folder, or the name of a volume (default: the volume @service-data)
#   COMFYUI_MEMORY  such as 24g (default: @memory_text)
#   COMFYUI_CPUS    such as 4 (default: all)
# compose.yaml has the same settings.
set -eu
cd "$(dirname "$0")"

fail() {
    printf 'error[%s]: %s\n  next:  %s\n' "$1" "$2" "$3" >&2
    exit 34
}

engine=${1:-}
case $engine in
podman | docker) shift ;;
*) fail usage "name the engine" "sh run.sh podman, or sh run.sh docker" ;;
esac
[ "$(uname -m)" = @cpu ] ||
    fail platform "the image is for @cpu, and this machine is $(uname -m)" "inv image --platform linux_$(uname -m)"
command -v "$engine" >/dev/null || fail engine "$engine is not installed" "install it, or use the other engine"
reason=$("$engine" info 2>&1 >/dev/null) ||
    fail engine "$engine does not work: $(printf %s "$reason" | tail -n 1)" "start its service, or join its group"

if [ "$engine" = podman ]; then
    podman image exists @image || podman tag "$(podman pull --quiet oci:image:@tag)" @image
    # Podman starts a failing container again without a pause.
    set -- --read-only-tmpfs=false --restart on-failure:5 "$@@"
    # Without root, the user of the container is the user who runs it.
    [ "$(id -u)" = 0 ] || set -- --userns keep-id:uid=@user,gid=@user "$@@"
else
    set -- --restart unless-stopped "$@@"
    docker image inspect @image >/dev/null 2>&1 || tar -C image -cf - . | docker load --quiet
fi
memory=${COMFYUI_MEMORY:-@memory_shell}

exec "$engine" run --detach --name @service --pull never \
    --user @user:@user --read-only --cap-drop ALL --security-opt no-new-privileges \
    --memory "$memory" --cpus "${COMFYUI_CPUS:-0}" --pids-limit 4096 --shm-size 1g --tmpfs /tmp:mode=1777 \
    --health-cmd "@health" --health-interval 10s --health-timeout 10s --health-retries 3 \
    --health-start-period @{seconds}s --stop-signal SIGINT --stop-timeout 30 \
    --volume "${COMFYUI_DATA:-@service-data}:@data" @run_options \
    "$@@" @image
