{{- define "gpurun.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "gpurun.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "gpurun.labels" -}}
{{ include "gpurun.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* Whether the pod asks anything of the API server. */}}
{{- define "gpurun.account" -}}
{{- if or .Values.dra.enabled (eq .Values.labels.target "node") }}yes{{ end }}
{{- end }}

{{- /* Whether GPUs are shared by MPS. */}}
{{- define "gpurun.mps" -}}
{{- if dig "sharing" "mps" "" .Values.config }}yes{{ end }}
{{- end }}
