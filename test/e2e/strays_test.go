package e2e

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"dolium/test/e2e/host"
)

func TestExecsThatAreCutOffByTheEndLeaveNothing(t *testing.T) {
	h, d := newHost(t)
	for round := range 12 {
		name := fmt.Sprintf("cut%d", round)
		d.OK("run", "-d", "--init", "--name", name, "busybox", "sleep", "1000")
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				for range 3 {
					_ = d.Run("exec", name, "true") // or the container has ended
				}
			})
		}
		d.OK("kill", name)
		wg.Wait()
		d.OK("rm", "-f", name)
	}
	_, worker := h.Keeper()
	host.Eventually(t, "no zombie is left", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", worker, worker))
		if err != nil {
			return err
		}
		for _, pid := range strings.Fields(string(children)) {
			if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil && strings.Contains(string(stat), ") Z") {
				return fmt.Errorf("%s", stat)
			}
		}
		return nil
	})
}
