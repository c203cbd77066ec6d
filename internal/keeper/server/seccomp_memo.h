#include <stddef.h>

// Where a recording is written to.
#define SECCOMP_MEMO_FD 3

void seccomp_memo_record(void);
void seccomp_memo_use(const void *memo, size_t size);
