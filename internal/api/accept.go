package api

import (
	"mime"
	"strconv"
	"strings"
)

// negotiateMedia returns the offer an Accept header likes best, the earlier one when it likes several the same, and
// nothing when it likes none or there is no header.
func negotiateMedia(accept []string, offers ...string) string {
	best, bestQ := "", 0.0
	for _, offer := range offers {
		if q := quality(accept, offer); q > bestQ {
			best, bestQ = offer, q
		}
	}
	return best
}

// quality is the weight the header gives to offer; the most specific range that covers it counts.
func quality(accept []string, offer string) float64 {
	q, specific := 0.0, -1
	for _, field := range accept {
		for item := range strings.SplitSeq(field, ",") {
			media, params, err := mime.ParseMediaType(item)
			if err != nil {
				continue
			}
			s := -1
			major, _, _ := strings.Cut(offer, "/")
			switch media {
			case offer:
				s = 2
			case major + "/*":
				s = 1
			case "*/*":
				s = 0
			}
			if s <= specific {
				continue
			}
			specific, q = s, 1
			if v, err := strconv.ParseFloat(params["q"], 64); err == nil {
				q = v
			}
		}
	}
	return q
}
