#!/usr/bin/env bash
# Prints a kubeconfig with which the steps use the cluster of kubectl's current context. It contains the cluster's address
# and certificate authority, and a token of the service account diloco-site, and refers to no other files. Put it into a
# Secret in the steps' cluster.
#
#   kubeconfig.sh [namespace] [lifetime of the token]    by default diloco-site and 720h
set -euo pipefail
namespace=${1:-diloco-site}
lifetime=${2:-720h}

cluster() { kubectl config view --minify --flatten --raw --output "jsonpath={.clusters[0].cluster.$1}"; }
server=$(cluster server)
authority=$(cluster certificate-authority-data)
token=$(kubectl create token diloco-site --namespace "$namespace" --duration "$lifetime")
cat <<END
apiVersion: v1
kind: Config
clusters:
  - name: site
    cluster:
      server: $server
${authority:+      certificate-authority-data: $authority}
users:
  - name: diloco-site
    user:
      token: $token
contexts:
  - name: site
    context:
      cluster: site
      user: diloco-site
      namespace: $namespace
current-context: site
END
