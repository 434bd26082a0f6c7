import Foundation
import Testing

@testable import ApertusCore

/// Answers id by id: the pieces that Python makes of them, and laws that hold for any ids.
@Suite struct AnswerParserTests {
    private static func tokenizer() throws -> Tokenizer {
        try Tokenizer(
            folder: try Fixtures.folder.appendingPathComponent("conversations/v1-embedded"))
    }

    private static func parser(_ row: JSON, _ tokenizer: Tokenizer, _ roles: Roles) throws
        -> AnswerParser
    {
        let numbers = Numbers()
        return try AnswerParser(
            tokenizer, roles: roles, stops: row["stops"]?.items?.compactMap(\.text) ?? [],
            isThinking: row["thinking"]?.flag ?? false,
            toolNames: row["names"]?.items?.compactMap(\.text) ?? [], newID: { numbers.next() })
    }

    private static func piece(_ row: JSON) throws -> Piece {
        let items = try #require(row.items)
        let text = try #require(items[items.count > 2 ? 4 : 1].text)
        switch items[0].text {
        case "text": return .text(text)
        case "thought": return .thought(text)
        default:
            return .call(
                CallPart(
                    index: items[1].int!, id: items[2].text, name: items[3].text, arguments: text,
                    isWithdrawn: items[5].flag!))
        }
    }

    @Test func everyPieceIsPythonsInAnySplit() throws {
        let tokenizer = try Self.tokenizer()
        let roles = try Roles(tokenizer)
        let groups = try #require(try Fixtures.json("answers.json").items)
        #expect(groups.count > sized(1000, 200))
        var (calls, malformed) = (0, 0)
        for group in groups {
            var answers: [Answer] = []
            for row in try #require(group.items) {
                var parser = try Self.parser(row, tokenizer, roles)
                var steps = try #require(row["ids"]?.items).map { parser.push(Int32($0.int!)) }
                steps.append(parser.finish(isCut: row["cut"]?.flag ?? false))
                let wanted = try #require(row["steps"]?.items).map {
                    try #require($0.items).map { try Self.piece($0) }
                }
                // A `String` equals another of the same meaning in other characters.
                #expect(
                    steps == wanted && "\(steps)".utf8.elementsEqual("\(wanted)".utf8),
                    "\(row["ids"]!.written)")
                #expect(parser.malformed == row["malformed"]?.int)
                #expect(parser.endedWithCalls == row["ended_with_calls"]?.flag)
                var answer = Answer()
                for piece in steps.joined() { answer.add(piece) }
                answers.append(answer)
                calls += answer.calls.count
                malformed += parser.malformed
            }
            #expect(answers.allSatisfy { $0 == answers[0] })
        }
        #expect(calls > sized(300, 50))
        #expect(malformed > sized(300, 50))
    }

    @Test func anAnswerBecomesAMessage() throws {
        let tokenizer = try Self.tokenizer()
        var parser = try AnswerParser(tokenizer, roles: Roles(tokenizer))
        var answer = Answer()
        let ids =
            [69] + tokenizer.encode("Hm.") + [71] + tokenizer.encode("[{\"f\": {\"a\": 1}}]") + [72]
        for id in ids { for piece in parser.push(id) { answer.add(piece) } }
        for piece in parser.finish() { answer.add(piece) }
        #expect(answer.thoughts == "Hm.")
        #expect(answer.calls.map(\.name) == ["f"])
        #expect(answer.calls[0].id?.count == 29)
        let format = try ChatFormat("v1", tokenizer: tokenizer, bos: 1)
        let result = Message.result("7", of: answer.calls[0].id)
        let prompt = try format.prompt(
            [.user("U"), answer.message, result], thinks: true, end: .none)
        let wanted = [67] + ids + tokenizer.encode("[7]") + [68]
        #expect(Array(prompt.suffix(wanted.count)) == wanted)
        #expect(parser.endedWithCalls)
    }

    @Test func aCallsIDIsNewEachTime() {
        let ids = Set((0 ..< 500).map { _ in ToolCall.newID() })
        #expect(ids.count == 500)
        #expect(ids.allSatisfy { $0.hasPrefix("call_") && $0.count == 29 })
    }

    @Test func blocksAreBounded() throws {
        let tokenizer = try Self.tokenizer()
        let roles = try Roles(tokenizer)
        func read(_ block: String) throws -> (Answer, Int) {
            var parser = try AnswerParser(tokenizer, roles: roles)
            var answer = Answer()
            for id in [Role.tools.start] + tokenizer.encode(block) {
                for piece in parser.push(id) { answer.add(piece) }
            }
            for piece in parser.finish() { answer.add(piece) }
            return (answer, parser.malformed)
        }
        func nested(_ depth: Int) -> String {
            String(repeating: "{\"a\":", count: depth) + "1" + String(repeating: "}", count: depth)
        }
        #expect(try read("[{\"f\": \(nested(64))}]").0.calls.map(\.arguments) == [nested(64)])
        let block = "[{\"f\": \(nested(65))}]"
        #expect(try read(block).0.text == block)
        #expect(try read(block).1 == 1)
        var scanner = CallScanner(index: 0, newID: { "x" })
        _ = scanner.feed(Array("[{\"f\": {\"a\": \"".utf8))
        _ = scanner.feed(Array(repeating: 0x61, count: CallScanner.mostBytes))
        #expect(scanner.hasFailed)
    }

    @Test func anyIDsAreRead() throws {
        let tokenizer = try Self.tokenizer()
        let roles = try Roles(tokenizer)
        var rng = SystemRandomNumberGenerator()
        let some: [Int32] = [-1, .min, .max, 67, 69, 70, 71, 72, 32, 33, 1, 2]
        for _ in 0 ..< 2000 {
            var parser = try AnswerParser(tokenizer, roles: roles, stops: ["a"], toolNames: ["f"])
            for _ in 0 ..< Int.random(in: 0 ... 20, using: &rng) {
                let id =
                    Bool.random(using: &rng)
                    ? some.randomElement(using: &rng)! : .random(in: 0 ..< 900)
                for piece in parser.push(id) { #expect(!piece.text.contains("<|")) }
            }
            _ = parser.finish(isCut: .random(using: &rng))
            #expect(parser.push(100).isEmpty)
            #expect(parser.finish().isEmpty)
        }
    }
}

/// Numbers the calls of one answer.
private final class Numbers: @unchecked Sendable {
    private var count = 0

    func next() -> String {
        defer { count += 1 }
        return "call_\(count)"
    }
}
