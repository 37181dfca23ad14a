"""Descriptions of a pod's directories for readers outside the pod."""

from trainer.kubernetes.api.kinds import Object
from trainer.places import OWN_DISK, Place, Places


def places_of(pod: Object, container: str) -> Places:
    """The volumes mounted by a pod's container, by mount path: claims, Secrets, ConfigMaps, and the pod's own."""
    metadata, spec = pod["metadata"], pod["spec"]
    volumes = {volume["name"]: _name(volume) for volume in spec.get("volumes") or []}
    mounts = (it for one in spec["containers"] if one["name"] == container for it in one.get("volumeMounts") or [])
    return Places(
        {
            mount["mountPath"].rstrip("/"): Place(volumes[mount["name"]], _inside(mount, metadata["name"]))
            for mount in mounts
            if volumes.get(mount["name"])
        }
    )


def _name(volume: Object) -> str:
    if "persistentVolumeClaim" in volume:
        return f"claim {volume['persistentVolumeClaim']['claimName']}"
    if "secret" in volume:
        return f"Secret {volume['secret']['secretName']}"
    if "configMap" in volume:
        return f"ConfigMap {volume['configMap']['name']}"
    return OWN_DISK if "emptyDir" in volume else ""


def _inside(mount: Object, pod: str) -> str:
    """The mounted directory of the volume. Our templates name it after the pod, or mount the root."""
    return str(mount.get("subPath") or mount.get("subPathExpr", "").replace("$(POD_NAME)", pod))
