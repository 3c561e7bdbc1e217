/* Stands in for NVIDIA's pyxis, which Debian has not: sbatch and srun take its options, the task runs on the host and finds what it
   was given in its environment, as PYXIS_STUB_CONTAINER_IMAGE and so on. */
#include <ctype.h>
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(pyxis_stub, 1)

static const struct {
  const char *name;
  int has_value;
} options[] = {
    {"container-image", 1}, {"container-mounts", 1},     {"container-workdir", 1},       {"container-name", 1},
    {"container-env", 1},   {"container-mount-home", 0}, {"no-container-mount-home", 0}, {"container-writable", 0},
};
enum { COUNT = sizeof options / sizeof *options };
static char values[COUNT][4096];

static int note(int option, const char *value, int remote) {
  (void)remote;
  snprintf(values[option], sizeof values[option], "%s", value && *value ? value : "1");
  return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv) {
  (void)argc, (void)argv;
  for (int i = 0; i < COUNT; i++) {
    struct spank_option option = {
        (char *)options[i].name, options[i].has_value ? (char *)"VALUE" : NULL, (char *)"[pyxis stub]", options[i].has_value, i, note};
    if (spank_option_register(spank, &option) != ESPANK_SUCCESS) slurm_error("pyxis_stub: --%s", options[i].name);
  }
  return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
  (void)argc, (void)argv;
  for (int i = 0; i < COUNT; i++) {
    char name[64];
    if (!values[i][0]) continue;
    snprintf(name, sizeof name, "PYXIS_STUB_%s", options[i].name);
    for (char *c = name; *c; c++) *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
    spank_setenv(spank, name, values[i], 1);
  }
  return 0;
}
