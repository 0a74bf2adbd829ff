{{/* The labels that select a part's pods; they never change. (dict "root" $ "part" "router") */}}
{{- define "modelfleet.selector" -}}
app.kubernetes.io/name: modelfleet
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{/* All labels of a part's objects. */}}
{{- define "modelfleet.labels" -}}
{{ include "modelfleet.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: modelfleet
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "modelfleet.image" -}}
{{- with .Values.image -}}
{{- if .registry }}{{ .registry }}/{{ end }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- if .digest }}@{{ .digest }}{{ end }}
{{- end -}}
{{- end }}

{{/* Where the control stream is: the headless Service, so that every operator is found. */}}
{{- define "modelfleet.fleet" -}}
modelfleet-operator.{{ .Release.Namespace }}.svc:9100
{{- end }}

{{/* Variables that both programs read. */}}
{{- define "modelfleet.environment" -}}
- name: MODELFLEET_ID
  valueFrom: {fieldRef: {fieldPath: metadata.uid}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- with .Values.telemetry.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_EXPORTER_OTLP_PROTOCOL
  value: {{ $.Values.telemetry.protocol }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: service.instance.id=$(MODELFLEET_ID),k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME)
{{- end }}
{{- end }}

{{/* What the Pod Security level `restricted` asks of a pod, and of a container. */}}
{{- define "modelfleet.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "modelfleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "modelfleet.probes" -}}
livenessProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 10
  timeoutSeconds: 3
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 2
  timeoutSeconds: 3
{{- end }}

{{/* Where a part's pods may run: apart from each other if there is room. */}}
{{- define "modelfleet.scheduling" -}}
{{- $values := get .root.Values .part -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "modelfleet.selector" . | nindent 12 }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
