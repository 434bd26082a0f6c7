import ApertusKit
import Foundation
import Testing

#if os(macOS) || os(Linux)
    /// The command line, run as a shell runs it; keys and exit codes as Python's.
    @Suite(.serialized) struct CommandTests {
        private func run(_ arguments: String...) throws -> (code: Int32, out: Data, err: String) {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = arguments
            let (out, err) = (Pipe(), Pipe())
            (process.standardOutput, process.standardError) = (out, err)
            process.standardInput = FileHandle.nullDevice
            try process.run()
            let data = out.fileHandleForReading.readDataToEndOfFile()
            let notes = err.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            return (process.terminationStatus, data, String(decoding: notes, as: UTF8.self))
        }

        /// Beside what runs the tests.
        private static var program: URL {
            get throws {
                var folder = URL(fileURLWithPath: CommandLine.arguments[0])
                while folder.path != "/" {
                    folder.deleteLastPathComponent()
                    let found = folder.appendingPathComponent("apertus")
                    if FileManager.default.isExecutableFile(atPath: found.path) { return found }
                }
                throw ApertusError(.notFound, "apertus is not beside the tests")
            }
        }

        private func keys(_ value: Any, _ prefix: String = "") -> Set<String> {
            guard let object = value as? [String: Any] else { return [] }
            return object.reduce(into: []) { found, member in
                found.insert(prefix + member.key)
                found.formUnion(keys(member.value, "\(prefix)\(member.key)."))
            }
        }

        @Test func generatePrintsPythonsKeysAndText() throws {
            let expected = try KitFixtures.expected
            let done = try run(
                "generate", "-m", try KitFixtures.model.path, "-n", "\(expected.tokens)", "-t", "0",
                "--json", expected.questions[1].prompt)
            #expect(done.code == 0)
            let object = try JSONSerialization.jsonObject(with: done.out)
            #expect(keys(object) == Set(expected.keys["generate"] ?? []))
            #expect((object as? [String: Any])?["text"] as? String == expected.questions[1].text)
            #expect(
                (object as? [String: Any])?["token_ids"] as? [Int]
                    == expected.questions[1].token_ids)
        }

        @Test func textGoesToStdoutAndTheRestToStderr() throws {
            let expected = try KitFixtures.expected
            let done = try run(
                "generate", "--model", try KitFixtures.model.path,
                "--max-tokens=\(expected.tokens)",
                "--temp", "0", expected.questions[1].prompt)
            #expect(String(decoding: done.out, as: UTF8.self) == expected.questions[1].text + "\n")
            #expect(done.err.contains("tokens/s"))
        }

        @Test func verifyPrintsPythonsKeys() throws {
            let done = try run("verify", try KitFixtures.model.path, "--json")
            #expect(done.code == 0)
            let object = try JSONSerialization.jsonObject(with: done.out)
            #expect(keys(object) == Set(try KitFixtures.expected.keys["verify"] ?? []))
        }

        @Test func selftestSaysWhatItCompared() throws {
            let done = try run("selftest", try KitFixtures.model.path)
            #expect(done.code == 0)
            #expect(String(decoding: done.out, as: UTF8.self).contains("all as they should be"))
        }

        @Test(
            arguments: [
                (["generate", "--nonsense", "Hi"], 2), (["generate", "-n", "0", "Hi"], 2),
                (["generate", "-n", "3", "-n", "4", "Hi"], 2), (["generate", "a", "b"], 2),
                (["nonsense"], 2), (["generate", "-m", "/nowhere", "Hi"], 4), (["verify"], 2),
                (["verify", "/nowhere"], 4), (["generate", "Hi"], 2),
            ] as [([String], Int32)])
        func refusalsAreOneLine(_ words: [String], _ code: Int32) throws {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = words
            let err = Pipe()
            process.standardError = err
            process.standardInput = FileHandle.nullDevice
            try process.run()
            let notes = err.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            #expect(process.terminationStatus == code)
            let lines = String(decoding: notes, as: UTF8.self).split(separator: "\n")
            #expect(lines.count == 1 && lines[0].hasPrefix("error: "))
        }

        @Test func tooLittleMemoryIsFive() throws {
            let done = try run(
                "generate", "-m", try KitFixtures.model.path, "--memory-limit", "1MB", "Hi")
            #expect(done.code == 5)
        }

        @Test func anInterruptEndsTheAnswer() throws {
            let process = Process()
            process.executableURL = try Self.program
            process.arguments = [
                "generate", "-m", try KitFixtures.model.path, "-t", "0", "-n", "2000", "--raw",
                "The capital of France is",
            ]
            let (out, err) = (Pipe(), Pipe())
            (process.standardOutput, process.standardError) = (out, err)
            try process.run()
            let first = out.fileHandleForReading.availableData
            process.interrupt()
            let rest = out.fileHandleForReading.readDataToEndOfFile()
            process.waitUntilExit()
            #expect(process.terminationStatus == 130)
            #expect(String(decoding: first + rest, as: UTF8.self).hasSuffix("\n"))
        }
    }
#endif
