{{/* The prefix of all names: the release's name, as a DNS-1035 label that leaves room for suffixes. */}}
{{- define "diloco.name" -}}
{{- $name := .Release.Name | replace "." "-" | trunc 40 | trimSuffix "-" -}}
{{- if regexMatch "^[a-z]" $name }}{{ $name }}{{ else }}training-{{ $name }}{{ end }}
{{- end }}

{{- define "diloco.namespace" -}}
{{ .Values.deploymentNamespace | default .Release.Namespace }}
{{- end }}

{{- define "diloco.image" -}}
{{ .Values.deploymentImage | default (printf "diloco-pipelines-python:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "diloco.runId" -}}
{{ coalesce .Values.diloco.runId .Values.elastic.etcd.runId .Release.Name }}
{{- end }}

{{- define "diloco.deployment" -}}
{{ dig "deploymentName" .Values.deploymentName (.Values.global | default dict) }}
{{- end }}

{{/* The kind of the workers' jobs: the one in the values, or else one that the cluster supports. */}}
{{- define "diloco.launcher" -}}
{{- $served := ternary "trainjob" "pytorchjob" (.Capabilities.APIVersions.Has "trainer.kubeflow.org/v1alpha1") }}
{{- ternary $served .Values.diloco.launcher (eq .Values.diloco.launcher "auto") }}
{{- end }}

{{/* The pipeline rejects the whole of C4 (365 million documents), so a million unless a value sets the number. */}}
{{- define "diloco.maxSamples" -}}
{{- ternary 1000000 .Values.diloco.maxSamples (and (eq .Values.diloco.dataset "c4") (eq (int .Values.diloco.maxSamples) -1)) | int64 }}
{{- end }}

{{/* The volume with the pipeline's results. */}}
{{- define "diloco.results" -}}
{{ include "diloco.name" . }}-results
{{- end }}

{{- define "diloco.labels" -}}
app.kubernetes.io/name: diloco-pipelines
app.kubernetes.io/instance: {{ include "diloco.name" . }}
app.kubernetes.io/component: pipeline
app.kubernetes.io/part-of: diloco-pipelines
{{- end }}

{{/* The security contexts of pods that mount the results' volume. The Pod Security Standard "restricted" admits them. */}}

{{- define "diloco.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "diloco.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities: { drop: [ALL] }
{{- end }}

{{/* etcd */}}

{{- define "diloco.etcd" -}}
{{ include "diloco.name" . }}-etcd
{{- end }}

{{/* Whether the release has its own etcd: "true", or nothing. */}}
{{- define "diloco.etcd.installed" -}}
{{- if not (or .Values.etcd.endpoints .Values.elastic.etcd.externalEndpoint) }}
{{- if not .Values.etcd.enabled }}{{ fail "etcd.endpoints must name an etcd when etcd.enabled is false" }}{{ end }}
{{- if eq .Values.elastic.etcd.protocol "https" }}
{{- fail "elastic.etcd.protocol=https needs your own etcd (etcd.endpoints), such as manifests/overlays/prod: the chart's etcd has no TLS" }}
{{- end }}
{{- print "true" }}
{{- end }}
{{- end }}

{{- define "diloco.etcd.members" -}}
{{- $name := include "diloco.etcd" . }}
{{- $members := list }}
{{- range until (int .Values.etcd.replicaCount) }}
{{- $members = append $members (printf "%s-%d=http://%s-%d.%s:2380" $name . $name . $name) }}
{{- end -}}
SCHEME: http
ETCD_INITIAL_CLUSTER: {{ join "," $members }}
{{- end }}

{{/* The name of etcd's ConfigMap, derived from its content, so that members restart when it changes. */}}
{{- define "diloco.etcd.config" -}}
{{- $root := index . 0 }}{{ $what := index . 1 -}}
{{ include "diloco.etcd" $root }}-{{ $what }}-{{ include (printf "diloco.etcd.%s" $what) $root | sha256sum | trunc 8 }}
{{- end }}

{{/* Tokens */}}

{{- define "diloco.wandbKey" -}}
{{ .Values.diloco.wandbApiKey | default .Values.diloco.wandbUserKey }}
{{- end }}

{{- define "diloco.tokens" -}}
{{ include "diloco.name" . }}-tokens
{{- end }}

{{/* The configuration: the values under the parameters' names, as JSON, without tokens. */}}

{{- define "diloco.snake" -}}
{{- $tree := dict }}
{{- range $key, $value := . }}
{{- if kindIs "map" $value }}{{ $value = include "diloco.snake" $value | fromJson }}{{ end }}
{{- $_ := set $tree (snakecase $key) $value }}
{{- end }}
{{- toJson $tree }}
{{- end }}

{{- define "diloco.config" -}}
{{- $diloco := omit .Values.diloco "huggingfaceToken" "wandbApiKey" "wandbUserKey" }}
{{- $cluster := omit .Values "diloco" "global" "pipeline" }}
{{- $config := include "diloco.snake" (merge (dict) $diloco $cluster) | fromJson }}
{{- $_ := set $config "launcher" (include "diloco.launcher" .) }}
{{- $_ := set $config "max_samples" (include "diloco.maxSamples" . | int64) }}
{{- $_ := set $config "run_id" (include "diloco.runId" .) }}
{{- $_ := set $config "deployment_name" (include "diloco.deployment" .) }}
{{- $_ := set $config "deployment_namespace" (include "diloco.namespace" .) }}
{{- $_ := set $config "deployment_image" (include "diloco.image" .) }}
{{- if include "diloco.etcd.installed" . }}
{{- $name := include "diloco.etcd" . }}
{{- $endpoints := list }}
{{- range until (int .Values.etcd.replicaCount) }}
{{- $endpoints = append $endpoints (printf "%s-%d.%s.%s.svc:2379" $name . $name (include "diloco.namespace" $)) }}
{{- end }}
{{- $_ := set $config.etcd "endpoints" $endpoints }}
{{- end }}
{{- if .Values.diloco.huggingfaceToken }}{{ $_ := set $config "huggingface_secret" (include "diloco.tokens" .) }}{{ end }}
{{- if include "diloco.wandbKey" . }}{{ $_ := set $config "wandb_secret" (include "diloco.tokens" .) }}{{ end }}
{{- toPrettyJson $config }}
{{- end }}

{{/* The name of the pipeline's Job. A Job cannot be changed, so other values need another one. */}}
{{- define "diloco.job" -}}
{{- $content := print (include "diloco.config" .) (toJson .Values.pipeline) .Chart.Version }}
{{- include "diloco.name" . }}-{{ $content | sha256sum | trunc 8 }}
{{- end }}
