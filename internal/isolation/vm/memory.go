package vm

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"dolium/internal/fault"

	"github.com/containerd/errdefs"
)

// A guest's memory is anonymous memory of its QEMU unless something must share it. Two kinds are to be had by option, and
// such machines boot instead of starting from a template, whose memory is of the first kind.
const (
	optionMemory = "dolium.vm.memory"

	// memoryHuge is of the host's huge pages: fewer misses of the TLB, and none of it goes back to the host.
	memoryHuge = "huge"
	// memoryMergeable lets the host's KSM store pages once that are equal in several guests. It isn't the default because
	// guests can tell by the time a write takes that another one has such a page.
	memoryMergeable = "mergeable"
)

const hugePage = 2 << 20

// checkMemory checks what is said of a machine's memory. Error: ErrInvalidArgument.
func checkMemory(annotations map[string]string, mounts bool) (warnings []string, err error) {
	switch kind, said := annotations[optionMemory]; {
	case !said, kind == memoryHuge:
	case kind != memoryMergeable:
		return nil, invalid("%s is %q, and can be %s or %s", optionMemory, kind, memoryHuge, memoryMergeable)
	case mounts:
		return nil, invalid("%s=%s is not possible with volumes or binds: what serves them shares the guest's memory, and such memory isn't merged", optionMemory, memoryMergeable)
	default:
		if run, err := os.ReadFile("/sys/kernel/mm/ksm/run"); err != nil || strings.TrimSpace(string(run)) != "1" {
			warnings = append(warnings, "The host doesn't merge memory: KSM is off (echo 1 >/sys/kernel/mm/ksm/run turns it on)")
		}
	}
	return warnings, nil
}

// memoryBackend is QEMU's option for memory of a kind, in bytes.
func memoryBackend(kind string, shared bool, size int64) string {
	switch {
	case kind == memoryHuge:
		return fmt.Sprintf("memory-backend-memfd,id=mem0,size=%dM,hugetlb=on,hugetlbsize=2M,share=%s", size>>20, onOff(shared))
	case shared:
		return fmt.Sprintf("memory-backend-memfd,id=mem0,size=%dM,share=on,reserve=off", size>>20)
	default:
		return fmt.Sprintf("memory-backend-ram,id=mem0,size=%dM,reserve=off,merge=%s", size>>20, onOff(kind == memoryMergeable))
	}
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// haveHugePages checks that the host has as many as a machine's memory takes, in bytes. Error: ErrFailedPrecondition.
func haveHugePages(size int64) error {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return err
	}
	defer f.Close()
	count := map[string]int64{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) == 2 && strings.HasPrefix(fields[0], "HugePages_") {
			if count[fields[0]], err = strconv.ParseInt(fields[1], 10, 64); err != nil {
				return err
			}
		}
	}
	free := count["HugePages_Free:"] - count["HugePages_Rsvd:"] // which others were promised
	if need := size / hugePage; free < need {
		return fault.New(errdefs.ErrFailedPrecondition, "the machine's memory takes %d huge pages, and the host has %d free: sysctl vm.nr_hugepages=N makes more", need, free)
	}
	return nil
}
