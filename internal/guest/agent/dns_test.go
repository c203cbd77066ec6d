package agent

import (
	"testing"

	"github.com/miekg/dns"
)

func TestAnswersThatAreTooLongForUDPSayThatTheyGoOn(t *testing.T) {
	q := new(dns.Msg)
	q.SetQuestion("name.example.", dns.TypeTXT)
	plain, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if n := udpSize(plain); n != 512 {
		t.Errorf("a plain query takes %d bytes", n)
	}
	q.SetEdns0(1232, false)
	edns, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if n := udpSize(edns); n != 1232 {
		t.Errorf("a query with EDNS takes %d bytes", n)
	}
	answer := new(dns.Msg)
	answer.SetReply(q)
	for range 50 {
		rr, err := dns.NewRR(`name.example. 60 IN TXT "some text of some length"`)
		if err != nil {
			t.Fatal(err)
		}
		answer.Answer = append(answer.Answer, rr)
	}
	long, err := answer.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var short dns.Msg
	if err := short.Unpack(truncated(long)); err != nil || !short.Truncated || len(short.Question) != 1 || len(short.Answer) != 0 {
		t.Errorf("%v, %v", short.String(), err)
	}
	if truncated([]byte{1, 2}) != nil {
		t.Error("what is no answer is sent on")
	}
}
