// A module of the name service switch with one user, for the tests of accounts that are in no file: libnss_gpuruntest.so.2.
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <string.h>
#include <errno.h>

static enum nss_status user(struct passwd *into) {
    *into = (struct passwd){.pw_name = "directory-user", .pw_passwd = "x", .pw_uid = 54321, .pw_gid = 54321,
                            .pw_gecos = "", .pw_dir = "/home/directory-user", .pw_shell = "/bin/sh"};
    return NSS_STATUS_SUCCESS;
}

enum nss_status _nss_gpuruntest_getpwuid_r(uid_t uid, struct passwd *into, char *buffer, size_t size, int *error) {
    return uid == 54321 ? user(into) : NSS_STATUS_NOTFOUND;
}

enum nss_status _nss_gpuruntest_getpwnam_r(const char *name, struct passwd *into, char *buffer, size_t size, int *error) {
    return strcmp(name, "directory-user") == 0 ? user(into) : NSS_STATUS_NOTFOUND;
}

enum nss_status _nss_gpuruntest_initgroups_dyn(const char *name, gid_t own, long *start, long *size, gid_t **groups,
                                               long limit, int *error) {
    if (strcmp(name, "directory-user") != 0) return NSS_STATUS_NOTFOUND;
    if (*start < *size) (*groups)[(*start)++] = 7001;
    return NSS_STATUS_SUCCESS;
}
